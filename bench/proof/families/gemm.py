"""fp8_gemm, dense, of groups of rows and of masked batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..claims import Claim, accurate, faster_than, steady, tested
from ..steps import Data, Step, benchmark

ORDER = 1
OPS = {
    "fp8_gemm": ("fp8_gemm", "fp8_gemm_"),
    "fp8_gemm_grouped": ("fp8_gemm_grouped", "fp8_gemm_grouped_"),
    "fp8_gemm_masked": ("fp8_gemm_masked", "fp8_gemm_masked_"),
}

SHAPES: dict[str, list[tuple[int, int, int]]] = {  # M, N, K: research/gemm-quant.md section 7.5
    "large": [(4096, 2112, 7168), (4096, 4096, 7168), (4096, 7168, 16384), (8192, 4096, 7168)],
    "short-k": [(4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 2048)],
    "decode": [(1, 7168, 2048), (16, 4096, 7168), (64, 4096, 7168), (128, 7168, 16384)],
}
GROUPED_SHAPES: dict[str, list[tuple[str, int, int, int, int]]] = {  # kind, G, rows of each, N, K; bench/grouped.py
    "grouped": [
        ("uniform", 4, 8192, 4096, 7168), ("uniform", 8, 4096, 7168, 2048), ("uniform", 32, 512, 4096, 7168),
    ],
    "ragged": [("zipf", 8, 4096, 4096, 7168), ("zipf", 32, 512, 7168, 2048)],
    "masked": [("masked", 6, 20, 4096, 7168), ("masked", 32, 20, 7168, 2048), ("masked", 2, 512, 4096, 7168)],
}  # fmt: skip


def _dense(group: str, _: Path) -> Data:
    from bench import fp8_gemm

    return fp8_gemm.bench(SHAPES[group])


def _grouped(group: str, _: Path) -> Data:
    from bench import grouped

    return grouped.bench(GROUPED_SHAPES[group])


def _micro(measurement: str, _: Path) -> Data:
    from .. import micro

    return micro.MEASUREMENTS[measurement]()


STEPS = [
    *(
        benchmark(
            f"bench-fp8_gemm-{group}", 12 + 10 * len(shapes), 60 + 30 * len(shapes),
            "fp8_gemm beside cuBLASLt blockwise, cuBLAS bf16, DeepGEMM", partial(_dense, group),
            priority=3 if group == "large" else 4,
        )
        for group, shapes in SHAPES.items()
    ),
    *(
        benchmark(
            f"bench-fp8_gemm_{group}", 12 + 12 * len(shapes), 60 + 40 * len(shapes),
            f"FP8 products of groups ({group}) beside a loop of cuBLASLt, torch's grouped bf16 product, DeepGEMM",
            partial(_grouped, group),
        )
        for group, shapes in GROUPED_SHAPES.items()
    ),
    Step(
        "micro-smem-port", "benchmark", 5, 15, 90,
        "does TMA write traffic share the shared-memory port with wgmma?", partial(_micro, "smem-port"),
        ("build-probes",),
    ),
    Step(
        "micro-phase", "benchmark", 5, 15, 90,
        "does a phase offset of the two math warpgroups, or a second partial, pay?", partial(_micro, "phase"),
        ("build-probes",),
    ),
]  # fmt: skip

CLAIMS = [
    tested("fp8_gemm.bits", "fp8_gemm", "Equals the `hopper` reference bit for bit", "fp8_gemm_bits"),
    *steady("fp8_gemm", "fp8_gemm_repeat", "fp8_gemm_graph"),
    Claim(
        "fp8_gemm.accuracy", "fp8_gemm", "fp32 output within relRMS 3e-4 of fp64 at K up to 16384",
        "bench-fp8_gemm-large", accurate(3e-4),
    ),
    *(
        Claim(
            f"fp8_gemm.speed.{group}", "fp8_gemm", f"At least {ratio:.2f}x cuBLASLt blockwise at {where}",
            f"bench-fp8_gemm-{group}", faster_than("cublaslt", ratio),
        )
        for group, where, ratio in (
            ("large", "K >= 7168, M >= 4096", 1.0), ("short-k", "K 512 to 2048", 1.0), ("decode", "M <= 128", 1.3),
        )
    ),
    Claim(
        "fp8_gemm.deepgemm", "fp8_gemm", "At least 1.00x DeepGEMM at K >= 7168, M >= 4096", "bench-fp8_gemm-large",
        faster_than("deepgemm", 1.0),
    ),
    *(
        claim
        for kernel, word in (
            ("fp8_gemm_grouped", "1.00x DeepGEMM on the rows that it takes"), ("fp8_gemm_masked", "1.00x DeepGEMM"),
        )
        for claim in (
            tested(
                f"{kernel}.bits", kernel, "Equals the `hopper` reference bit for bit, in every tile", f"test_{kernel}_bits["
            ),
            *steady(kernel, f"{kernel}_repeat", f"{kernel}_graph"),
            Claim(
                f"{kernel}.cublaslt", kernel, "At least 1.00x a loop of cuBLASLt blockwise that knows the sizes",
                f"bench-{kernel}", faster_than("cublaslt", 1.0),
            ),
            Claim(f"{kernel}.deepgemm", kernel, f"At least {word}", f"bench-{kernel}", faster_than("deepgemm", 1.0)),
        )
    ),
    Claim(
        "fp8_gemm_grouped.ragged", "fp8_gemm_grouped", "At least 1.00x a loop of cuBLASLt blockwise on Zipf-sized groups",
        "bench-fp8_gemm_ragged", faster_than("cublaslt", 1.0),
    ),
    tested(
        "fp8_gemm_grouped.nonsense", "fp8_gemm_grouped",
        "Offsets that descend or are out of range write nothing outside of D", "fp8_gemm_grouped_nonsense",
    ),
]  # fmt: skip
