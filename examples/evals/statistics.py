"""What a score of n items is worth: its 95 % interval, and whether it is more than guessing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.errors import UserError

_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Score:
    """A share of right answers among `count`. low, high: 95 % interval (Wilson). chance: what guessing gets."""

    name: str
    value: float
    low: float
    high: float
    count: int
    chance: float = 0.0

    @property
    def near_chance(self) -> bool:
        """Whether guessing explains it: chance lies in the interval, or above it."""
        return self.chance > 0 and self.chance >= self.low

    def __str__(self) -> str:
        chance = f", chance {self.chance:.1%}" if self.chance else ""
        label = " (near chance)" if self.near_chance else ""
        return (
            f"{self.name}: {self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.count}{chance}{label}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"near_chance": self.near_chance}


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a share; sound for small counts and for 0 and 1, unlike the normal approximation."""
    if count < 1 or not 0 <= right <= count:
        raise UserError(f"interval: must have 0 <= right <= count, count >= 1; got {right}, {count}")
    value, z2 = right / count, _Z * _Z
    middle = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(value * (1 - value) / count + z2 / (4 * count * count))
    return min(value, max(0.0, middle - half)), max(
        value, min(1.0, middle + half)
    )  # rounding keeps it inside


def share(name: str, right: float, count: int, chance: float = 0.0) -> Score:
    """`right` of `count`, with the interval of a share; items may be right in part."""
    low, high = wilson(right, count)
    return Score(name, right / count, low, high, count, chance)


def score(name: str, right: Sequence[bool], chance: float = 0.0) -> Score:
    """The share of True."""
    return share(name, sum(right), len(right), chance)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """(sum / sum, low, high): a ratio over items, such as bits per byte, with the 95 % interval of the linearised ratio."""
    count, total = len(numerators), sum(denominators)
    if count < 2 or count != len(denominators) or total <= 0:
        raise UserError(f"ratio: needs 2 items or more, with a positive sum below; got {count}, {total}")
    value = sum(numerators) / total
    square = sum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    half = _Z * math.sqrt(square * count / (count - 1)) / total
    return value, value - half, value + half


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, estimated from `passed` of `samples` without bias:
    1 - C(samples - passed, k) / C(samples, k)."""
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise UserError(
            f"pass@k: must have 0 <= passed <= samples, 1 <= k <= samples; got {passed}, {samples}, {k}"
        )
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
