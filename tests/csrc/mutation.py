"""Leaves out one step of a kernel at a time - a fence, a wait, an arrival, an expect_tx - and asks whether a run notices.

A mutant is killed when, on some seed, the checker reports a hazard or the result is wrong. The kill rate says what the
checker and the tests are worth for this kernel; each survivor needs a reason.
`pytest -s -m slow tests/csrc/test_mutation.py` prints all of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.csrc.emulator.planted import ROOT, build, emulator_sources, rules_in
from tests.csrc.gemm.test_fp8_gemm import BF16, FP32, Problem

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


def _library(name: str, plain: list[Path], watched: list[Path]) -> ctypes.CDLL:
    sources = [*emulator_sources(), ROOT / "tests/csrc/drop_sites.cpp", *plain]
    return ctypes.CDLL(str(build(ROOT / "build" / f"mutation_{name}", sources, watched)))


def _sites(library: ctypes.CDLL) -> list[Site]:
    library.drop_sites.restype = ctypes.c_char_p
    return [tuple(item.split("@")) for item in library.drop_sites().decode().split()]  # type: ignore[misc]


def fp8_gemm() -> list[Kernel]:
    """Several tiles of one block and of a cluster; accumulation, so that D is read as well as written."""
    library = _library(
        "gemm",
        [ROOT / "csrc/common/tile_chooser.cpp", ROOT / "tests/csrc/gemm/fp8_gemm_driver.cpp"],
        [ROOT / "csrc/gemm/fp8_gemm.cu"],
    )
    library.fp8_gemm_on_emulator.restype = ctypes.c_char_p

    def kernel(name: str, shape: tuple[int, int, int], dtype, accumulate, tile, multicast) -> Kernel:
        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            # Positive operands: sums grow with K, so that a lost promotion shows in the bits.
            problem = Problem(*shape, dtype, accumulate=accumulate, positive=True)
            problem.checked = 1
            report = problem.run(
                library, tile=tile, multicast=multicast, sms=2, seed=seed, asynchrony=asynchrony, schedule=schedule,
                drop_kind=drop[0].encode(), drop_site=drop[1].encode(),
            )  # fmt: skip
            return report or ("data" if problem.differing() else "")

        return Kernel(name, run, lambda: _sites(library))

    return [
        kernel("fp8_gemm, 128x128 bf16", (136, 264, 1200), BF16, False, (128, 128), "none"),
        kernel(
            "fp8_gemm, 128x112 fp32 accumulating, multicast a", (136, 232, 1200), FP32, True, (128, 112), "a"
        ),
        kernel("fp8_gemm, 64x256 bf16, multicast b", (130, 264, 1200), BF16, False, (64, 256), "b"),
    ]


class QuantizeCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "q", "q_t", "scale", "scale_t")]
        + [("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("operation", ctypes.c_int32)]
        + [("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def quantisers() -> list[Kernel]:
    names = ("quantize_rows", "quantize_columns", "quantize_blocks")
    folder = ROOT / "csrc/quantize"
    library = _library(
        "quantize",
        [ROOT / "tests/csrc/quantize/quantize_driver.cpp"],
        [folder / f"{name}.cu" for name in names],
    )
    library.quantize_on_emulator.restype = ctypes.c_char_p

    def kernel(operation: int) -> Kernel:
        rows, columns = 200, 272
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(operation)).bfloat16()
        expected: list[torch.Tensor] = []

        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            out = [torch.full((100_000,), 0x55, dtype=torch.uint8) for _ in range(4)]
            call = QuantizeCall(
                x.data_ptr(), *(t.data_ptr() for t in out), rows, columns, operation, seed, asynchrony, schedule, 1,
                drop[0].encode(), drop[1].encode(),
            )  # fmt: skip
            report = library.quantize_on_emulator(ctypes.byref(call)).decode()
            if not expected and not report:  # bytes are proved against the reference elsewhere
                expected.extend(out)
            return report or ("" if all(map(torch.equal, out, expected)) else "data")

        return Kernel(names[operation], run, lambda: _sites(library))

    return [kernel(operation) for operation in (1, 2, 0)]  # the one with most steps first


class NormCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "other", "dy", "weight", "rstd")]
        + [("out", ctypes.c_void_p * 4)]
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "parts")]
        + [("operation", ctypes.c_int32), ("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


class ActivationCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("gate_up", "dy", "weight", "offsets")]
        + [("out", ctypes.c_void_p * 9)]
        + [(name, ctypes.c_int64) for name in ("rows", "inner", "groups", "padded_rows")]
        + [("operation", ctypes.c_int32), ("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kernel(
    name: str,
    library: ctypes.CDLL,
    entry: str,
    outputs: int,
    workspace: int,
    call_of: Callable[..., ctypes.Structure],
) -> Kernel:
    """One C call, `call_of(outputs, options)`, with its outputs compared with those of the unchanged kernel."""
    getattr(library, entry).restype = ctypes.c_char_p
    expected: list[torch.Tensor] = []

    def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
        out = [torch.full((200_000,), 0x55, dtype=torch.uint8) for _ in range(outputs)]
        options = (seed, asynchrony, schedule, 1, drop[0].encode(), drop[1].encode())
        call = call_of([t.data_ptr() for t in out], options)
        report: str = getattr(library, entry)(ctypes.byref(call)).decode()
        results = [t for i, t in enumerate(out) if i != workspace]
        if not expected and not report:  # bits are proved against the reference elsewhere
            expected.extend(results)
        return report or ("" if all(map(torch.equal, results, expected)) else "data")

    return Kernel(name, run, lambda: _sites(library))


def norms() -> list[Kernel]:
    """Rows of several warps; two blocks that each go on with more rows; a second kernel behind the first."""
    library = _library(
        "norm",
        [ROOT / "tests/csrc/norm/norm_driver.cpp"],
        [ROOT / "csrc/norm/rms_norm.cu", ROOT / "csrc/norm/rms_norm_backward.cu"],
    )
    rows, columns = 37, 1040
    x, other, dy = (_normal(i, rows, columns).bfloat16() for i in range(3))
    weight, rstd = _normal(3, columns), _normal(4, rows).abs()
    inputs = [t.data_ptr() for t in (x, other, dy, weight, rstd)]

    def kernel(name: str, operation: int) -> Kernel:
        def call_of(out: list[int], options: tuple[object, ...]) -> NormCall:
            _ = x, other, dy, weight, rstd  # stay alive
            room = (ctypes.c_void_p * 4)(*out[:3], out[3])
            return NormCall(*inputs, room, rows, columns, 2, operation, *options)

        return _kernel(name, library, "norm_on_emulator", 4, 2 if operation else -1, call_of)

    return [kernel("rms_norm_backward", 1), kernel("rms_norm_residual_quantize", 0)]


def activations() -> list[Kernel]:
    names = ("swiglu", "swiglu_backward", "swiglu_backward_quantize")
    library = _library(
        "activation",
        [ROOT / "tests/csrc/activation/activation_driver.cpp"],
        [ROOT / f"csrc/activation/{name}.cu" for name in names],
    )
    offsets = torch.tensor([3, 40, 40, 135], dtype=torch.int32)

    def kernel(operation: int) -> Kernel:
        rows, inner = 140 if operation == 2 else 21, 128 if operation == 2 else 656
        gate_up, dy = _normal(1, rows, 2 * inner).bfloat16(), _normal(2, rows, inner).bfloat16()
        weight = _normal(3, rows)

        def call_of(out: list[int], options: tuple[object, ...]) -> ActivationCall:
            inputs = [t.data_ptr() for t in (gate_up, dy, weight, offsets)]
            return ActivationCall(
                *inputs, (ctypes.c_void_p * 9)(*out), rows, inner, 3, 384, operation, *options
            )

        return _kernel(names[operation], library, "activation_on_emulator", 9, 8, call_of)

    return [kernel(operation) for operation in (2, 1, 0)]


FAMILIES = {
    "fp8_gemm": fp8_gemm,
    "quantise": quantisers,
    "norm": norms,
    "activation": activations,
}
