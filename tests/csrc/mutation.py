"""Leaves out one step of a kernel at a time - a fence, a wait, an arrival, an expect_tx - and asks whether a run notices.

A mutant is killed when, on some seed, the checker reports a hazard or the result is wrong. The kill rate says what the
checker and the tests are worth for this kernel; each survivor needs a reason.
`pytest -s -m slow tests/csrc/test_mutation.py` prints all of it.

Kernels are in tests/csrc/mutations, a module each family.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import deepseek_ops
from deepseek_ops._emulation import ASYNCHRONY, SCHEDULES
from deepseek_ops._registry import absent_reason
from tests.csrc.building import ROOT
from tests.csrc.emulator.planted import rules_in

Site = tuple[str, str]  # kind, "file:line"

# Steps that no CPU run can miss, by kind and the reason.
UNDETECTABLE = {
    "fence_mbarrier_init": "the emulator's mbarrier.init takes effect at once; only hardware can tell",
    "grid_dependency_wait": "a single launch has no grid before it",
    "grid_dependency_launch": "a hint to the next grid, of which a single launch has none",
}


def reason_to_survive(site: Site) -> str:
    """Why no run on a CPU can miss this step; "" where one must."""
    kind, place = site
    if kind == "syncwarp":
        file, line = place.split(":")
        source = next((ROOT / "csrc").rglob(file)).read_text().splitlines()[int(line) - 1]
        if "cluster" in source:  # a cluster barrier follows on the line, or in what it calls
            return "barrier.cluster is .aligned: it wants converged lanes, which the emulator does not model"
        if "release" in source and file == "bf16_gemm.cuh":
            return "no lane reads the stage by itself: wgmma does, and the whole warp has waited for it"
        if "a ring behind" in source:
            return "nothing was read: it takes one lane that sleeps while the ring goes around, which no schedule makes"
    if kind in ("cp_async_commit", "cp_async_wait") and place.startswith("fp8_wgrad.cuh:"):
        return "the ring's barriers have waited for these copies; it only keeps the thread's list of copies short"
    return UNDETECTABLE.get(kind, "")


@dataclass
class Kernel:
    """How to run one kernel: run(seed, asynchrony, schedule, drop) gives a report, or "data" for a wrong result."""

    name: str
    run: Callable[[int, int, int, Site], str]
    sites: Callable[[], list[Site]]


@dataclass
class Outcome:
    site: Site
    killed_by: str = ""  # a rule, or "data"
    runs: int = 0
    reason: str = ""  # why it may survive


def mutate(kernel: Kernel, seeds: int, limit: int | None = None) -> list[Outcome]:
    """One outcome for every step that the unchanged kernel passes; each mutant runs until it is killed."""
    clean = kernel.run(0, 1, 1, ("", ""))
    assert clean == "", f"{kernel.name} is not clean: {clean}"
    outcomes = []
    sites = kernel.sites()
    if limit is not None and len(sites) > limit:  # evenly spread
        sites = [sites[i * len(sites) // limit] for i in range(limit)]
    for site in sites:
        outcome = Outcome(site, reason=reason_to_survive(site))
        tries = 1 if outcome.reason else seeds
        for seed in range(tries):
            for asynchrony in (2, 1, 0):  # lazy finds most
                report = kernel.run(seed, asynchrony, (seed + asynchrony) % 4, site)
                outcome.runs += 1
                if report:
                    outcome.killed_by = (
                        "data" if report == "data" else min(rules_in(report), default=report[:60])
                    )
                    break
            if outcome.killed_by:
                break
        outcomes.append(outcome)
    return outcomes


def unexplained(outcomes: list[Outcome]) -> list[Site]:
    return [o.site for o in outcomes if not o.killed_by and not o.reason]


def table(name: str, outcomes: list[Outcome]) -> str:
    killed = sum(bool(o.killed_by) for o in outcomes)
    killable = [o for o in outcomes if o.killed_by or not o.reason]
    rate = killed / len(killable) if killable else 1
    lines = [f"{name}: {killed} of {len(outcomes)} mutants killed; {rate:.0%} of those that a CPU can tell"]
    for o in outcomes:
        fate = (
            f"killed by {o.killed_by} in run {o.runs}"
            if o.killed_by
            else f"SURVIVES: {o.reason or 'unexplained'}"
        )
        lines.append(f"  {o.site[0]:<24} {o.site[1]:<28} {fate}")
    return "\n".join(lines)


def sites(driver: ctypes.CDLL) -> list[Site]:
    driver.drop_sites.restype = ctypes.c_char_p
    return [tuple(item.split("@")) for item in driver.drop_sites().decode().split()]  # type: ignore[misc]


def on_checked(
    name: str, call: Callable[[], list[torch.Tensor]], more: Callable[[], list[Site]] = list
) -> Kernel:
    """An op on the backend `checked`; `more`: sites of launches before its last one, whose own are asked for."""
    reason = absent_reason("checked")
    if reason:
        pytest.skip(f"backend checked: {reason}")
    expected: list[torch.Tensor] = []

    def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
        options = {"asynchrony": ASYNCHRONY[asynchrony], "schedule": SCHEDULES[schedule]}
        if drop != ("", ""):
            options["drop"] = drop
        with deepseek_ops.backend("checked"), deepseek_ops.emulation(seed=seed, **options):
            try:
                out = call()
            except deepseek_ops.KernelError as error:
                return str(error)
        if not expected:
            expected.extend(out)
        return "" if all(map(torch.equal, out, expected)) else "data"

    def sites() -> list[Site]:
        return [*dict.fromkeys([*((s.kind, s.site) for s in deepseek_ops.drop_sites()), *more()])]

    return Kernel(name, run, sites)


FOLDER = Path(__file__).parent / "mutations"
FAMILIES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def kernels(family: str) -> list[Kernel]:
    """Of one family, the one with most steps first."""
    return importlib.import_module(f"tests.csrc.mutations.{family}").kernels()
