"""bf16 products: any major, dense, grouped, masked, and their weight gradients."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, faster_than, tested
from ..steps import Data, benchmark

ORDER = 4
_FORMS = ("gemm", "gemm_grouped", "gemm_masked", "wgrad", "wgrad_grouped")
OPS = {"bf16_gemm": (*_FORMS, *(f"{form}_" for form in _FORMS), "wgrad_masked")}

# M, N, K: router, absorbed projections of MLA, output head, a dense layer, and few rows (section 7.5 of the research).
DENSE = [(4096, 256, 7168), (4096, 512, 128), (4096, 7168, 7168), (4096, 24576, 1536), (1024, 129280, 7168)]
FEW_ROWS = [(1, 256, 7168), (64, 7168, 7168), (16, 129280, 7168)]
# groups, rows of each, N, K of the experts.
GROUPED = [(8, 4096, 4096, 7168), (8, 4096, 7168, 2048), (32, 512, 4096, 7168)]


def _bench(_: Path) -> Data:
    from bench import bf16_gemm

    return bf16_gemm.bench()


STEPS = [benchmark("bench-bf16_gemm", 120, 420, "bf16 GEMM, dense and grouped, beside cuBLAS", _bench)]

CLAIMS = [
    *(
        tested(f"bf16_gemm.{name}", "bf16_gemm", text, f"bf16_gemm_{name}")
        for name, text in (
            ("bits", "Equals the tensor-core model bit for bit, in any major and grouping"),
            ("repeat", "Twenty repeats are bitwise equal"),
            ("graph", "A launch is captured in a CUDA graph and replays with other offsets"),
        )
    ),
    *(
        Claim(
            f"bf16_gemm.speed.{baseline}", "bf16_gemm", f"At least 0.97x PyTorch's {what}", "bench-bf16_gemm",
            faster_than(baseline, 0.97, baseline),
        )
        for baseline, what in (("cublas", "dense products"), ("torch", "grouped products"))
    ),
]  # fmt: skip
