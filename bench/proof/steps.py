"""What a step of the proof is. The steps that there are stand in bench/proof/families, one file a kernel family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Data = dict[str, Any]  # what a step found, as the ledger keeps it
GROUND = "ground"  # the family that every other one stands on


@dataclass(frozen=True)
class Step:
    """One unit of proof; it runs in a process of its own.

    estimate_s:  what it usually takes: a step starts only when that much of the budget is left
    deadline_s:  when it is killed
    priority:    lower runs first; within a priority, in the order of the families
    run:         carries it out, given the folder of golden vectors; only then imports torch and what it measures
    needs:       steps that must have ended well before
    family:      the file that it stands in, which fills it in
    """

    name: str
    kind: str  # environment | build | probe | tests | benchmark
    priority: int
    estimate_s: float
    deadline_s: float
    what: str
    run: Callable[[Path], Data]
    needs: tuple[str, ...] = ("build",)
    family: str = GROUND


def benchmark(
    name: str, estimate_s: float, deadline_s: float, what: str, run: Callable[[Path], Data], priority: int = 4
) -> Step:
    """A measurement that needs the native module."""
    return Step(name, "benchmark", priority, estimate_s, deadline_s, what, run)
