"""How kernels run in the emulator: seeds, adversarial scheduling, and the reports of what it found.

The backends `emulated` and `checked` run a kernel's own source on the CPU, one fiber for each CUDA thread.
`checked` also follows every memory access and raises `KernelError` for races, missing fences and the like
(csrc/emulator/rules.h lists them). Options hold for a block of code; the same options give the same run, bit for bit.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ._checks import check_choice, fail, require

ASYNCHRONY = ("eager", "random", "lazy")
SCHEDULES = ("fifo", "random", "starve", "pct")

_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
_options = contextvars.ContextVar("deepseek_ops_emulation", default=_DEFAULTS)
_applied: dict[str, Mapping[str, Any]] = {}  # target -> options that its module has
_last: Any = None  # the module of the last run


class KernelError(RuntimeError):
    """The emulator found a fault in a kernel. The text is the whole report, with the seed that replays it."""


@dataclass(frozen=True)
class Statistics:
    """What one run did. Equal options and inputs give an equal `digest`, a hash of every scheduling decision."""

    switches: int
    async_operations: int
    accesses: int
    wgmma: int
    bank_conflicts: int
    digest: int
    seconds: float


@dataclass(frozen=True)
class DropSite:
    """A step that a mutation run may leave out: what it is, its "file:line", and how often the last run passed it."""

    kind: str
    site: str
    count: int


@dataclass(frozen=True)
class BankSite:
    """A place in a kernel that touches shared memory, by "file:line": its requests (one for a warp) and their wavefronts.

    `least` wavefronts would have done without conflicts; `worst` is the excess of a single request.
    """

    site: str
    what: str
    requests: int
    wavefronts: int
    least: int
    worst: int

    @property
    def conflicts(self) -> int:
        """Wavefronts too many."""
        return self.wavefronts - self.least


@contextlib.contextmanager
def emulation(
    *,
    seed: int | None = None,
    asynchrony: str | None = None,
    schedule: str | None = None,
    sm_count: int | None = None,
    resident_clusters: int | None = None,
    banks: bool | None = None,
    fast_tensor_core: bool | None = None,
    off: Collection[str] | None = None,
    drop: tuple[str, str] | tuple[str, str, int] | None = None,
    max_reports: int | None = None,
    step_budget: int | None = None,
    deadline_seconds: float | None = None,
) -> Iterator[None]:
    """Run the kernels of this block with these options; None keeps what an outer block or the default says.

    seed:              of every random decision (default 0).
    asynchrony:        when copies and matrix products complete: "eager", "random" (default) or "lazy".
    schedule:          who runs next: "fifo", "random" (default), "starve" or "pct".
    sm_count:          multiprocessors that persistent kernels see (4).
    resident_clusters: clusters that run at the same time; the rest wait (4).
    banks:             on `checked`, count bank conflicts of plain accesses to shared memory too (`bank_report`).
    fast_tensor_core:  plain fp32 products instead of Hopper's exact accumulation.
    off:               names of rules not to check.
    drop:              (kind, "file:line") or (kind, "file:line", n): leave out this step, always or only the n-th time;
                       an empty site means every site. `drop_sites` lists what there is.
    max_reports:       hazards collected before a run stops (8).
    step_budget:       scheduler steps before a run counts as too slow (0: no limit).
    deadline_seconds:  wall clock of one run (300).
    """
    changes: dict[str, Any] = {
        "seed": seed,
        "asynchrony": asynchrony,
        "schedule": schedule,
        "sm_count": sm_count,
        "resident_clusters": resident_clusters,
        "banks": banks,
        "fast_tensor_core": fast_tensor_core,
        "off": None if off is None else set(off),
        "max_reports": max_reports,
        "step_budget": step_budget,
        "deadline_seconds": deadline_seconds,
    }
    if asynchrony is not None:
        check_choice("asynchrony", asynchrony, ASYNCHRONY)
    if schedule is not None:
        check_choice("schedule", schedule, SCHEDULES)
    require(not isinstance(off, str), "off", "must be a collection of rule names", repr(off))
    least = {"seed": 0, "sm_count": 1, "resident_clusters": 1, "max_reports": 1, "step_budget": 0}
    for name, low in least.items():
        value = changes[name]
        valid = value is None or (isinstance(value, int) and value >= low)
        require(valid, name, f"must be an integer of at least {low}", value)
    if drop is not None:
        if len(drop) not in (2, 3):
            fail("drop", 'must be (kind, "file:line") or (kind, "file:line", n)', drop)
        changes |= {"drop_kind": drop[0], "drop_site": drop[1], "drop_nth": drop[2] if len(drop) == 3 else -1}
    given = {name: value for name, value in changes.items() if value is not None}
    token = _options.set({**_options.get(), **given})
    try:
        yield
    finally:
        _options.reset(token)


def last_statistics() -> Statistics:
    """Of the last kernel that ran on `emulated` or `checked`."""
    return Statistics(**_module_of_last_run().last_statistics())


def drop_sites() -> list[DropSite]:
    """The steps of the last run that a mutation run may leave out."""
    return [DropSite(*site) for site in _module_of_last_run().last_drop_sites()]


def bank_sites() -> list[BankSite]:
    """Where the last run touched shared memory, most conflicts first.

    Only ldmatrix and stmatrix, unless it ran on `checked` with ``emulation(banks=True)``. Plain accesses are those of
    the source: nvcc may join neighbours into wider ones.
    """
    return [BankSite(*site) for site in _module_of_last_run().last_bank_sites()]


def bank_report() -> str:
    """`bank_sites` as a table."""
    rows = [("place", "what", "requests", "wavefronts", "conflicts", "worst")]
    rows += [
        (s.site, s.what, f"{s.requests}", f"{s.wavefronts}", f"{s.conflicts}", f"{s.worst}")
        for s in bank_sites()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _module_of_last_run() -> Any:
    if _last is None:
        raise RuntimeError("no kernel has run on the backends emulated or checked yet")
    return _last


def prepare(target: str, module: Any) -> None:
    """Give the module of `target` the options of this block; called before each of its kernels."""
    global _last
    options = _options.get()
    if _applied.get(target) is not options:
        module.set_options(dict(options))
        _applied[target] = options
    _last = module
