"""Products of few rows, where reading the weights once is all that takes time."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, bandwidth_at_least, faster_than, steady, tested
from ..steps import Data, benchmark

ORDER = 2
OPS = {
    "fp8_gemm_decode": ("fp8_gemm_decode", "fp8_gemm_decode_"),
    "fp8_gemm_masked_decode": ("fp8_gemm_masked_decode", "fp8_gemm_masked_decode_"),
}

SHAPES: list[tuple[int, int, int]] = [  # M, N, K
    (1, 2112, 7168), (16, 4096, 7168), (64, 4096, 7168), (8, 7168, 16384), (64, 7168, 16384), (64, 36864, 7168),
]  # fmt: skip
MASKED_SHAPES: list[tuple[int, int, int, int, int]] = [  # experts, rows of each, room for rows, N, K
    (6, 20, 64, 4096, 7168), (32, 20, 64, 4096, 7168), (32, 8, 64, 7168, 2048),
]  # fmt: skip


def _single(_: Path) -> Data:
    from bench import decode

    return decode.bench(SHAPES, [])


def _masked(_: Path) -> Data:
    from bench import decode

    return decode.bench([], MASKED_SHAPES)


STEPS = [
    benchmark(
        "bench-fp8_decode", 70, 240, "fp8_gemm_decode beside fp8_gemm, cuBLASLt blockwise, DeepGEMM, cuBLAS bf16", _single
    ),
    benchmark(
        "bench-fp8_masked_decode", 45, 180, "fp8_gemm_masked_decode beside a loop of cuBLASLt and DeepGEMM", _masked
    ),
]  # fmt: skip

CLAIMS = [
    *(
        claim
        for kernel, step in (
            ("fp8_gemm_decode", "bench-fp8_decode"), ("fp8_gemm_masked_decode", "bench-fp8_masked_decode"),
        )
        for claim in (
            tested(f"{kernel}.bits", kernel, "Equals its model bit for bit", f"test_{kernel}_bits"),
            *steady(kernel, f"test_{kernel}_repeat", f"test_{kernel}_graph"),
            Claim(
                f"{kernel}.bandwidth", kernel, "At least 75 % of HBM bandwidth on weights of 64 MB and more", step,
                bandwidth_at_least(kernel, 0.75),
            ),
            Claim(
                f"{kernel}.speed", kernel, "At least 1.30x cuBLASLt blockwise", step, faster_than("cublaslt", 1.3)
            ),
        )
    ),
    tested("fp8_gemm_decode.batch", "fp8_gemm_decode", "A row has the same bits in every batch", "test_fp8_gemm_decode_batch"),
]  # fmt: skip
