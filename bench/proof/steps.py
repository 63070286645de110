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

# Few rows: M, N, K of one product, and experts, rows of each, room for rows, N, K of a batch.
DECODE_SHAPES: list[tuple[int, int, int]] = [
    (1, 2112, 7168), (16, 4096, 7168), (64, 4096, 7168), (8, 7168, 16384), (64, 7168, 16384), (64, 36864, 7168),
]  # fmt: skip
MASKED_DECODE_SHAPES: list[tuple[int, int, int, int, int]] = [
    (6, 20, 64, 4096, 7168), (32, 20, 64, 4096, 7168), (32, 8, 64, 7168, 2048),
]  # fmt: skip
WGRAD_SHAPES: list[tuple[int, int, int]] = [  # M, N of the weight, tokens
    (7168, 2112, 4096), (1536, 24576, 4096), (512, 32768, 4096), (7168, 16384, 8192),
]  # fmt: skip
WGRAD_GROUPED_SHAPES: list[tuple[int, int, int, int]] = [  # G, M, N, tokens of each group
    (8, 4096, 7168, 4096), (8, 7168, 2048, 4096), (32, 4096, 7168, 512),
]  # fmt: skip
GROUPED_SHAPES: dict[str, list[tuple[str, int, int, int, int]]] = {  # kind, G, rows of each, N, K; bench/grouped.py
    "grouped": [
        ("uniform", 4, 8192, 4096, 7168), ("uniform", 8, 4096, 7168, 2048), ("uniform", 32, 512, 4096, 7168),
    ],
    "ragged": [("zipf", 8, 4096, 4096, 7168), ("zipf", 32, 512, 7168, 2048)],
    "masked": [("masked", 6, 20, 4096, 7168), ("masked", 32, 20, 7168, 2048), ("masked", 2, 512, 4096, 7168)],
}  # fmt: skip

QUANTIZE_SHAPES: list[tuple[int, int]] = [(4096, 7168), (16384, 7168), (65536, 2048)]  # T, H

MOE_TOKENS: list[int] = [4096, 16384, 65536]  # DeepSeek-V3's router and hidden size: bench/moe.py


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
    for group, grouped_shapes in GROUPED_SHAPES.items():
        steps.append(
            Step(
                f"bench-fp8_gemm_{group}", "benchmark", "gemm", 4, 12 + 12 * len(grouped_shapes),
                60 + 40 * len(grouped_shapes),
                f"FP8 products of groups ({group}) beside a loop of cuBLASLt, torch's grouped bf16 product, DeepGEMM", ("build",),
            )
        )  # fmt: skip
    steps += [
        Step(
            "bench-fp8_decode", "benchmark", "gemm", 4, 70, 240,
            "fp8_gemm_decode beside fp8_gemm, cuBLASLt blockwise, DeepGEMM, cuBLAS bf16", ("build",),
        ),
        Step(
            "bench-fp8_masked_decode", "benchmark", "gemm", 4, 45, 180,
            "fp8_gemm_masked_decode beside a loop of cuBLASLt and DeepGEMM", ("build",),
        ),
    ]  # fmt: skip
    steps += [
        Step(
            "bench-fp8_wgrad", "benchmark", "wgrad", 4, 50, 180,
            "fp8_wgrad beside cuBLASLt blockwise, cuBLAS bf16, DeepGEMM", ("build",),
        ),
        Step(
            "bench-fp8_wgrad_grouped", "benchmark", "wgrad", 4, 60, 240,
            "fp8_wgrad_grouped beside torch's grouped bf16 product and DeepGEMM", ("build",),
        ),
        Step(
            "bench-bf16_gemm", "benchmark", "gemm", 4, 120, 420, "bf16 GEMM, dense and grouped, beside cuBLAS", ("build",)
        ),
        Step(
            "bench-loss", "benchmark", "loss", 4, 40, 180, "fused linear cross entropy beside the unfused formula", ("build",)
        ),
        Step("bench-moe", "benchmark", "moe", 4, 60, 240, "routing and permutation beside a plain copy", ("build",)),
        Step("bench-quantize", "benchmark", "quantize", 3, 40, 150, "quantisers beside a plain copy", ("build",)),
        Step("bench-quantize", "benchmark", "quantize", 3, 90, 240, "quantisers beside a plain copy", ("build",)),
        Step(
            "bench-optimizer", "benchmark", "optimizer", 4, 30, 120,
            "AdamW and the gradient norm beside a plain copy and torch's fused AdamW", ("build",),
        ),
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
