"""What a request asks for, and the token that follows from it: a function of its logits, its seed and the place alone.

The random number of a token is a hash of (seed, place in the answer). So there is no generator whose state a neighbour,
a preemption or a rejected draft could move, and the same request draws the same numbers again wherever it runs.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.errors import UserError

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. temperature 0 is greedy; top_k 0 keeps all; stop: strings, of which none is shown;
    stop_tokens: end the answer and stay in its tokens; deadline: seconds from submission, None for none."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "in [0, 100]"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit whole number"),
            ("deadline", self.deadline is None or 0 < self.deadline < math.inf, "seconds above 0, or none"),
        ):
            if not holds:
                raise UserError(f"{name}: must be {rule}; got {getattr(self, name)}")
        if len(self.stop) > MAX_STOPS or not all(1 <= len(s) <= MAX_STOP_CHARACTERS for s in self.stop):
            rule = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
            raise UserError(f"stop: must be {rule}; got {self.stop!r:.80}")


def uniform(seed: int, place: int) -> float:
    """The random number in [0, 1) for the answer's token at `place`."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, place), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def outside_nucleus(ordered: torch.Tensor, top_p: torch.Tensor | float) -> torch.Tensor:
    """Which of the descending probabilities [B, V] lie past the smallest set that reaches top_p: a token stays if the
    mass before it is below top_p."""
    return ordered.cumsum(-1) - ordered >= top_p


def choose(logits: torch.Tensor, wanted: Sequence[tuple[Sampling, int]]) -> list[int]:
    """One token per row of fp32 logits [B, V]; wanted: for each row its sampling and the place in its answer."""
    chosen = logits.argmax(-1).tolist()
    rows = [row for row, (sampling, _) in enumerate(wanted) if sampling.temperature > 0]
    if not rows:
        return chosen

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    samplings = [wanted[row][0] for row in rows]
    scaled = logits[rows].double() / column([s.temperature for s in samplings])
    ordered, index = torch.softmax(scaled, -1).sort(dim=-1, descending=True, stable=True)
    if any(s.top_k for s in samplings):
        kept = column([s.top_k or logits.shape[-1] for s in samplings])
        ordered = ordered.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= kept, 0.0)
        ordered /= ordered.sum(-1, keepdim=True)  # top_p is a share of what top_k has left
    ordered = ordered.masked_fill(outside_nucleus(ordered, column([s.top_p for s in samplings])), 0.0)
    mass = ordered.cumsum(-1)
    total = mass[:, -1:]
    target = column([uniform(wanted[row][0].seed, wanted[row][1]) for row in rows]) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # The first token whose mass passes the target: it has mass of its own, as the target is below the total.
    place = torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[-1] - 1)
    for row, token in zip(rows, index.gather(-1, place).squeeze(-1).tolist(), strict=True):
        chosen[row] = token
    return chosen
