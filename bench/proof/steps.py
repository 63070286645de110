"""The steps of a proof, most telling first; `worker` holds what each of them does."""

from __future__ import annotations

from .plan import GROUND, Step

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

GEMM_SHAPES: dict[str, list[tuple[int, int, int]]] = {  # M, N, K: research/gemm-quant.md section 7.5
    "large": [(4096, 2112, 7168), (4096, 4096, 7168), (4096, 7168, 16384), (8192, 4096, 7168)],
    "short-k": [(4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 2048)],
    "decode": [(1, 7168, 2048), (16, 4096, 7168), (64, 4096, 7168), (128, 7168, 16384)],
}

MEMORY_BOUND_ROWS = (4096, 16384)  # of bench.memory_bound, at the widest of a kernel's columns
MEMORY_BOUND = ("norm", "activation")  # its families

QUANTIZE_SHAPES: list[tuple[int, int]] = [(4096, 7168), (16384, 7168), (65536, 2048)]  # T, H


def all_steps() -> list[Step]:
    """Every step, in the order in which a page lists them."""
    steps = [
        Step("environment", "environment", GROUND, 0, 10, 60, "clocks, power, driver, nvcc, torch"),
        Step(
            "build",
            "build",
            GROUND,
            0,
            120,
            420,
            "the native module `cuda`, if absent or older than its sources",
        ),
        Step("build-probes", "build", GROUND, 0, 45, 240, "every probe by nvcc and by g++ with the emulator"),
    ]
    for name, (estimate, deadline, what, _) in PROBES.items():
        steps.append(Step(f"probe-{name}", "probe", GROUND, 1, estimate, deadline, what, ("build-probes",)))
    steps += [
        Step(
            "vendor-partials", "probe", GROUND, 1, 20, 90,
            "cuBLASLt's own 128-deep partial sums against the tensor-core model, bit for bit",
        ),
        Step("tests", "tests", GROUND, 2, 120, 420, "pytest -m gpu", ("build",)),
        Step("ceilings", "benchmark", GROUND, 3, 25, 90, "copy bandwidth and bf16 cuBLAS, cold and sustained"),
    ]  # fmt: skip
    for group, shapes in GEMM_SHAPES.items():
        steps.append(
            Step(
                f"bench-fp8_gemm-{group}", "benchmark", "gemm", 3 if group == "large" else 4,
                12 + 10 * len(shapes), 60 + 30 * len(shapes),
                "fp8_gemm beside cuBLASLt blockwise, cuBLAS bf16, DeepGEMM", ("build",),
            )
        )  # fmt: skip
    steps += [
        Step(
            f"bench-memory-bound-{family}", "benchmark", family, 3, 40, 200,
            f"{family} kernels beside a plain copy and eager PyTorch", ("build",),
        )
        for family in MEMORY_BOUND
    ]  # fmt: skip
    steps += [
        Step("bench-quantize", "benchmark", "quantize", 3, 40, 150, "quantisers beside a plain copy", ("build",)),
        Step(
            "micro-smem-port", "benchmark", "gemm", 5, 15, 90,
            "does TMA write traffic share the shared-memory port with wgmma?", ("build-probes",),
        ),
        Step(
            "micro-phase", "benchmark", "gemm", 5, 15, 90,
            "does a phase offset of the two math warpgroups, or a second partial, pay?", ("build-probes",),
        ),
    ]  # fmt: skip
    return steps
