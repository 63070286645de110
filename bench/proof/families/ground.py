"""What every family stands on: the machine, the build, what the emulator assumes about silicon, the GPU tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..claims import Claim, probe_agrees
from ..steps import Data, Step

ORDER = 0
OPS: dict[str, tuple[str, ...]] = {}

# name: (estimate, deadline, what it settles, source in bench/probes)
PROBES: dict[str, tuple[float, float, str, str]] = {
    "fragments": (15, 90, "which thread holds which element of D and of A in registers", "wgmma.cu"),
    "operands": (
        15,
        90,
        "matrix descriptors: every layout and swizzle, both majors, every k step",
        "wgmma.cu",
    ),
    "numerics": (20, 120, "tensor-core sums on random and adversarial tiles", "wgmma.cu"),
    "tma_layout": (15, 90, "where TMA puts bytes: swizzles, element sizes, 1 to 5 dimensions", "tma.cu"),
    "tma_bounds": (15, 90, "TMA outside of the tensor: zero and NaN fill, negative coordinates", "tma.cu"),
    "tma_multicast": (15, 90, "multicast to the CTAs of a cluster", "tma.cu"),
    "tma_reduce": (15, 90, "reductions of TMA and bulk copies, rounding and subnormals", "tma.cu"),
    "convert": (15, 90, "conversions to and from e4m3 and bf16 around every boundary", "convert.cu"),
    "matrix_moves": (15, 90, "ldmatrix and stmatrix, straight and transposed", "matrix_moves.cu"),
}


def _environment(_: Path) -> Data:
    from ..machine import environment

    return environment()


def _build(_: Path) -> Data:
    from ..machine import build

    return build()


def _build_probes(_: Path) -> Data:
    from ..machine import build_probes

    return build_probes()


def _probe(name: str, golden: Path) -> Data:
    from ..machine import origin
    from ..probes import prove

    return prove(name, golden, origin())


def _vendor_partials(_: Path) -> Data:
    from ..vendor import partial_sums

    return partial_sums()


def _tests(_: Path) -> Data:
    from ..gpu_tests import run

    return run()


def _ceilings(_: Path) -> Data:
    from ..ceilings import bench

    return bench()


STEPS = [
    Step("environment", "environment", 0, 10, 60, "clocks, power, driver, nvcc, torch", _environment, ()),
    Step(
        "build", "build", 0, 120, 420, "the native module `cuda`, if absent or older than its sources", _build, ()
    ),
    Step("build-probes", "build", 0, 45, 240, "every probe by nvcc and by g++ with the emulator", _build_probes, ()),
    *(
        Step(f"probe-{name}", "probe", 1, estimate, deadline, what, partial(_probe, name), ("build-probes",))
        for name, (estimate, deadline, what, _) in PROBES.items()
    ),
    Step(
        "vendor-partials", "probe", 1, 20, 90,
        "cuBLASLt's own 128-deep partial sums against the tensor-core model, bit for bit", _vendor_partials, (),
    ),
    Step("tests", "tests", 2, 120, 420, "pytest -m gpu", _tests),
    Step("ceilings", "benchmark", 3, 25, 90, "copy bandwidth and bf16 cuBLAS, cold and sustained", _ceilings, ()),
]  # fmt: skip

CLAIMS = [
    *(
        Claim(
            f"emulator.{name}", "emulator", f"Equals silicon bit for bit: {what}", f"probe-{name}", probe_agrees
        )
        for name, (_, _, what, _) in PROBES.items()
    ),
    Claim(
        "tensor_core.vendor", "tensor-core model",
        "Equals cuBLASLt's 128-deep fp32 partial sums bit for bit (reference/tensor_core.py)",
        "vendor-partials", probe_agrees,
    ),
]  # fmt: skip
