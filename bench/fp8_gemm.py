"""fp8_gemm on a Hopper GPU against its floor and against what a user would take instead.

    python -m bench.fp8_gemm [--quick] [--only WORDS] [--json FILE]

For each shape of DeepSeek-V3, in one process and in turns, on random data with a cold L2, then most of a second back to
back (bench/proof/measure.py):

- ours         into a given output, tile chosen by the cost model
- cublaslt     cuBLASLt blockwise (torch.nn.functional.scaled_mm), scale layout work not timed
- deepgemm     DeepGEMM, where it is installed
- cublas-bf16  torch.mm on bf16 operands

The floor is max(FLOPs at 8192 per SM and clock at the boost clock, bytes at the data sheet's bandwidth). The result is
compared with fp64 where time is measured. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.families.gemm import SHAPES
from bench.proof.measure import compare
from bench.proof.rows import FP8_FLOP, Floor, Row, add_rates, command, on, product_floor, step, this_card
from bench.proof.steps import Data
from bench.proof.vendor import VendorOperands, deepgemm, exact_product, judge, judge_precise
from deepseek_ops import gemm, quantize

JUDGED_ROWS = 128  # of D, that are compared with fp64


@dataclass(frozen=True)
class Case:
    """D [m, n] over k."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        """For people."""
        return f"fp8_gemm {self.shape}"

    @property
    def shape(self) -> str:
        """As a ledger has it."""
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flop(self) -> float:
        """Of the product."""
        return 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Operands once, bf16 D once."""
        return self.m * self.k + self.n * self.k + 2 * self.m * self.n


def floor_us(case: Case, *card: float) -> Floor:
    """Microseconds that no version can beat."""
    return product_floor(case.flop, case.bytes, FP8_FLOP, *card)


def measure(case: Case) -> Row:
    """fp8_gemm and its baselines; one that cannot run says why."""
    m, n, k = case.m, case.n, case.k
    generator = torch.Generator("cuda").manual_seed(m * 7 + n * 3 + k)
    x, w = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16, generator=generator) for rows in (m, n))
    with deepseek_ops.backend("reference"):
        given = (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))
    a, scale_a, b, scale_b = given
    outputs: dict[str, Tensor] = {"ours": torch.empty(m, n, device="cuda", dtype=torch.bfloat16)}
    vendor = VendorOperands.of(*given)

    def cublaslt() -> None:
        outputs["cublaslt"] = vendor.multiply(torch.bfloat16)

    timed = compare(
        {
            "ours": on("cuda", lambda: gemm.fp8_gemm(*given, out=outputs["ours"])),
            "cublaslt": cublaslt,
            "deepgemm": deepgemm(*given, outputs),
            "cublas-bf16": lambda: torch.mm(x, w.T),
        }
    )
    add_rates(timed, case.flop, case.bytes)
    rows = slice(0, min(m, JUDGED_ROWS))
    exact = exact_product(a[rows], scale_a[:, rows], b, scale_b)
    judge(timed, outputs, exact)
    if "median_us" in timed["ours"]:
        precise = on("cuda", lambda: gemm.fp8_gemm(*given, out_dtype=torch.float32))()
        judge_precise(timed["ours"], precise, exact)
    return {
        "kernel": "fp8_gemm", "shape": case.shape, "floor_us": floor_us(case, *this_card()), "candidates": timed,
    }  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """The proof's shapes, or one of each kind."""
    return [Case(*shape) for shapes in SHAPES.values() for shape in shapes[: 1 if quick else None]]


def bench(shapes: Sequence[tuple[int, int, int]]) -> Data:
    """A step of the proof."""
    return step([measure(Case(*shape)) for shape in shapes])


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.fp8_gemm", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
