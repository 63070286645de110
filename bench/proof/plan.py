"""Steps and the budget of minutes: what runs next, what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from .steps import GROUND, Step


def select(steps: Iterable[Step], family: str | None) -> list[Step]:
    """The steps of one family with what they need; all of them for None. ValueError names the families."""
    steps = list(steps)
    families = sorted({step.family for step in steps} - {GROUND})
    if family is None:
        return steps
    if family == GROUND:
        return _with_needs(steps, [s for s in steps if s.family == GROUND])
    if family not in families:
        raise ValueError(f"--family: must be one of {', '.join([GROUND, *families])}; got {family!r}")
    wanted = [s for s in steps if s.family == family or s.kind in ("environment", "build", "tests")]
    return _with_needs(steps, wanted)


def _with_needs(steps: list[Step], wanted: list[Step]) -> list[Step]:
    by_name = {step.name: step for step in steps}
    names = {step.name for step in wanted}
    queue = list(wanted)
    while queue:
        for need in queue.pop().needs:
            if need not in names:
                names.add(need)
                queue.append(by_name[need])
    return [step for step in steps if step.name in names]


def order(steps: Iterable[Step], tried: Collection[str] = ()) -> list[Step]:
    """By priority; steps that were tried before and did not end well come after everything never tried."""
    return sorted(steps, key=lambda step: (step.name in tried, step.priority))


@dataclass
class Budget:
    """Minutes that only go down. `clock` returns seconds."""

    clock: Callable[[], float]
    seconds: float
    reserve_s: float = 5.0  # for the ledger and the page

    def __post_init__(self) -> None:
        self._began = self.clock()

    def left(self) -> float:
        """Seconds that steps may still use."""
        return self.seconds - self.reserve_s - (self.clock() - self._began)

    def refusal(self, step: Step) -> str | None:
        """Why a step must not start now; None when it fits."""
        left = self.left()
        if step.estimate_s <= left:
            return None
        return f"does not fit: needs about {step.estimate_s:.0f} s, {max(left, 0):.0f} s are left"

    def deadline(self, step: Step) -> float:
        """Seconds after which a step that starts now is killed: its own deadline, never past the budget."""
        return max(1.0, min(step.deadline_s, self.left()))


def simulate(steps: Iterable[Step], seconds: float) -> list[tuple[Step, str | None]]:
    """What a run of `seconds` would do if every step took its estimate: (step, None or the reason it is left out)."""
    spent = 0.0
    budget = Budget(lambda: spent, seconds)
    result: list[tuple[Step, str | None]] = []
    left_out: set[str] = set()
    for step in order(steps):
        missing = [need for need in step.needs if need in left_out]
        reason = f"needs {missing[0]}, which is left out" if missing else budget.refusal(step)
        if reason:
            left_out.add(step.name)
        else:
            spent += step.estimate_s
        result.append((step, reason))
    return result
