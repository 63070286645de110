"""FP8 weight gradients, dense and of groups of tokens."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, accurate, faster_than, steady, tested
from ..steps import Data, benchmark

ORDER = 3
OPS = {
    "fp8_wgrad": ("fp8_wgrad", "fp8_wgrad_"),
    "fp8_wgrad_grouped": ("fp8_wgrad_grouped", "fp8_wgrad_grouped_"),
}

SHAPES: list[tuple[int, int, int]] = [  # M, N of the weight, tokens
    (7168, 2112, 4096), (1536, 24576, 4096), (512, 32768, 4096), (7168, 16384, 8192),
]  # fmt: skip
GROUPED_SHAPES: list[tuple[int, int, int, int]] = [  # G, M, N, tokens of each group
    (8, 4096, 7168, 4096), (8, 7168, 2048, 4096), (32, 4096, 7168, 512),
]  # fmt: skip


def _dense(_: Path) -> Data:
    from bench import wgrad

    return wgrad.bench(SHAPES, [])


def _grouped(_: Path) -> Data:
    from bench import wgrad

    return wgrad.bench([], GROUPED_SHAPES)


STEPS = [
    benchmark("bench-fp8_wgrad", 50, 180, "fp8_wgrad beside cuBLASLt blockwise, cuBLAS bf16, DeepGEMM", _dense),
    benchmark(
        "bench-fp8_wgrad_grouped", 60, 240, "fp8_wgrad_grouped beside torch's grouped bf16 product and DeepGEMM", _grouped
    ),
]  # fmt: skip

CLAIMS = [
    *(
        claim
        for kernel in OPS
        for claim in (
            tested(f"{kernel}.bits", kernel, "Equals the `hopper` reference bit for bit", f"test_{kernel}_bits["),
            *steady(kernel, f"test_{kernel}_repeat", f"test_{kernel}_graph"),
            Claim(f"{kernel}.accuracy", kernel, "fp32 output within relRMS 3e-4 of fp64", f"bench-{kernel}", accurate(3e-4)),
            Claim(
                f"{kernel}.deepgemm", kernel, "At least 1.15x DeepGEMM's own 1D1D kernel, accumulating in fp32",
                f"bench-{kernel}", faster_than("deepgemm", 1.15),
            ),
        )
    ),
    Claim(
        "fp8_wgrad.speed", "fp8_wgrad", "At least 1.00x cuBLASLt blockwise with the addition that it needs",
        "bench-fp8_wgrad", faster_than("cublaslt", 1.0),
    ),
]  # fmt: skip
