"""How long ops and sends take, in any unit of time that the user likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..._checks import fail, require
from .schedule import Action, Kind, Pair


@dataclass(frozen=True)
class Costs:
    """Time of each kind of op; one number, or one per stage where stages are unequal.

    B is a whole backward, Bi the part of it that gives the gradient of the input (default B - W), W the part that gives
    those of the weights. `pair` is F&B for a stage of mean cost (default F + B: nothing is gained by overlapping); of
    other stages it takes the same share of their F + B. The defaults are those of the report's figure 5.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    weight: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] | None = None
    pair: float | None = None

    def by_stage(self, stages: int) -> StageCosts:
        """The table for a pipeline of `stages` stages; raises `ArgumentError` for what cannot be a cost."""
        forward = _per_stage("F", self.forward, stages)
        backward = _per_stage("B", self.backward, stages)
        weight = _per_stage("W", self.weight, stages)
        if self.input_gradient is None:
            rest = [b - w for b, w in zip(backward, weight, strict=True)]
            require(
                min(rest) > 0, "W", "must be below B, whose part it is", f"W={self.weight}, B={self.backward}"
            )
        else:
            rest = _per_stage("Bi", self.input_gradient, stages)
        both = sum(forward) / stages + sum(backward) / stages
        pair = both if self.pair is None else _per_stage("FB", self.pair, 1)[0]
        table = {Kind.F: forward, Kind.B: backward, Kind.BI: rest, Kind.W: weight}
        return StageCosts(table, 1.0 if pair == both else pair / both)


@dataclass(frozen=True)
class StageCosts:
    """`Costs` with one number per kind and stage; `pair_share` is F&B as a share of F + B."""

    table: dict[Kind, list[float]]
    pair_share: float

    def of(self, action: Action) -> float:
        """Time of one action."""
        if isinstance(action, Pair):
            apart = self.table[Kind.F][action.forward.stage] + self.table[Kind.B][action.backward.stage]
            return apart if self.pair_share == 1 else self.pair_share * apart
        return self.table[action.kind][action.stage]


@dataclass(frozen=True)
class Link:
    """Time of a send between two ranks. With `blocking` the sender does nothing else meanwhile; else it goes on at once."""

    latency: float = 0.0
    blocking: bool = False

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.latency) and self.latency >= 0,
            "latency",
            "must be finite and not negative",
            self.latency,
        )


KEYS = {"F": "forward", "B": "backward", "Bi": "input_gradient", "W": "weight", "FB": "pair"}


def parse_costs(text: str) -> Costs:
    """`Costs` from ``F=1,B=2,W=1,Bi=1,FB=2.6``; ``F=1/1/2/1`` gives one number per stage."""
    values: dict[str, float | list[float]] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        require(key in KEYS, "costs", f"must be KEY=NUMBER with keys {', '.join(KEYS)}", repr(part))
        require(KEYS[key] not in values, "costs", "may give each key once", repr(text))
        try:
            numbers = [float(number) for number in value.split("/")]
        except ValueError:
            fail("costs", "must be KEY=NUMBER or KEY=NUMBER/NUMBER/..., one per stage", repr(part))
        require(
            key != "FB" or len(numbers) == 1,
            "costs",
            "FB is one number, for a stage of mean cost",
            repr(part),
        )
        values[KEYS[key]] = numbers if len(numbers) > 1 else numbers[0]
    return Costs(**values)  # type: ignore[arg-type]


def _per_stage(name: str, value: float | Sequence[float], stages: int) -> list[float]:
    numbers = list(value) if isinstance(value, Sequence) else [value] * stages
    require(
        len(numbers) == stages,
        name,
        f"must be one number or {stages}, one per stage",
        f"{len(numbers)} numbers",
    )
    for number in numbers:
        require(math.isfinite(number) and number > 0, name, "must be finite and above 0", number)
    return numbers
