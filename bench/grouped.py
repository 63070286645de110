"""fp8_gemm_grouped and fp8_gemm_masked on a Hopper GPU against their floor and against what a user would take instead.

    python -m bench.grouped [--quick] [--only WORDS] [--json FILE]

Random data, cold L2, medians of turns in one process, then most of a second back to back (bench/proof/measure.py).
Baselines, each with what it does not do:

- cublaslt      a loop of blockwise scaled_mm, one per group: it is given the sizes on the host, which would cost a
                synchronisation, and has no groups and no masks
- grouped-bf16  torch._grouped_mm of bf16 operands (offsets on the device): no FP8 with fine-grained scales
- deepgemm      its m-grouped kernels where the package can be imported; contiguous groups start at multiples of 128
                rows, so that only shapes where ours do too are comparable, and rows of groups that do not are skipped

The floor is max(FLOPs at 8192 per SM and clock at the boost clock, bytes at the data sheet's bandwidth): every B, every
row that exists and its D once. Correctness against fp64 of the first rows of each group is asserted where time is
measured. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.measure import compare
from bench.proof.rows import (
    FP8_FLOP,
    ROUNDED_BF16,
    Floor,
    Row,
    add_rates,
    command,
    on,
    product_floor,
    step,
    this_card,
)
from bench.proof.steps import Data
from bench.proof.vendor import VendorOperands, exact_product
from deepseek_ops import gemm, quantize

PROBED_ROWS = 8  # of each group, that are compared with fp64
# research/gemm-quant.md section 7.5: (G, rows of each), both expert shapes, and the masked shapes.
EXPERTS = ((4096, 7168), (7168, 2048))
GROUPS, ROWS = (4, 8, 16, 32), (128, 512, 1024, 2048, 4096, 8192)
MASKED = ((1, 1024), (2, 512), (4, 256), (6, 20), (32, 20), (32, 192))


@dataclass(frozen=True)
class Case:
    """kind: "uniform" and "zipf" rows packed by offsets; "masked": a batch with room for twice the rows."""

    kind: str
    groups: int
    rows: int  # of each group, on average
    n: int
    k: int

    @property
    def kernel(self) -> str:
        """The op."""
        return "fp8_gemm_masked" if self.kind == "masked" else "fp8_gemm_grouped"

    @property
    def shape(self) -> str:
        """As a ledger has it."""
        return f"{self.kind} {self.groups}x{self.rows}x{self.n}x{self.k}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel} {self.shape}"

    @property
    def sizes(self) -> list[int]:
        """Rows of each group; Zipf: rank r has a share of 1 / r, in an order that is neither rising nor falling."""
        if self.kind != "zipf":
            return [self.rows] * self.groups
        weight = [1 / (1 + g * 5 % self.groups) for g in range(self.groups)]
        return [int(self.rows * self.groups * w / sum(weight)) for w in weight]


def floor_us(case: Case, *card: float) -> Floor:
    """Microseconds that no version can beat, by arithmetic and by bytes; bf16 D."""
    rows, n, k = sum(case.sizes), case.n, case.k
    moved = sum(s > 0 for s in case.sizes) * n * k + rows * (k * (1 + 4 / 128) + 2 * n)
    return product_floor(2.0 * rows * n * k, moved, FP8_FLOP, *card)


class Operands:
    """bf16 and e4m3 operands of a case on the GPU; the groups' rows of A, and where D has them."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator("cuda").manual_seed(case.rows * 7 + case.n * 3 + case.k + case.groups)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        self.case, self.masked = case, case.kind == "masked"
        self.room = 2 * case.rows if self.masked else 0
        self.bounds = list(itertools.accumulate(case.sizes, initial=0))
        self.x = draw(case.groups, self.room, case.k) if self.masked else draw(self.bounds[-1], case.k)
        self.w = draw(case.groups, case.n, case.k)
        with deepseek_ops.backend("reference"):
            self.b, self.scale_b = quantize.quantize_128x128(self.w)
            if self.masked:
                pieces = [quantize.quantize_1x128(x) for x in self.x]
                self.a, self.scale_a = (
                    torch.stack([a for a, _ in pieces]),
                    torch.stack([s for _, s in pieces]),
                )
            else:
                self.a, self.scale_a = quantize.quantize_1x128(self.x)
        values = case.sizes if self.masked else self.bounds
        self.index = torch.tensor(values, dtype=torch.int32, device="cuda")

    def rows_of(self, t: Tensor, g: int, count: int | None = None) -> Tensor:
        """The rows of a group in A or D, or the first of them."""
        size = self.case.sizes[g] if count is None else min(count, self.case.sizes[g])
        return t[g, :size] if self.masked else t[self.bounds[g] : self.bounds[g] + size]

    def scales_of(self, g: int, count: int | None = None) -> Tensor:
        size = self.case.sizes[g] if count is None else min(count, self.case.sizes[g])
        first = 0 if self.masked else self.bounds[g]
        return (self.scale_a[g] if self.masked else self.scale_a)[:, first : first + size]

    def new_output(self) -> Tensor:
        return torch.empty((*self.a.shape[:-1], self.case.n), device="cuda", dtype=torch.bfloat16)


def error_of(given: Operands, d: Tensor) -> float:
    """Relative RMS against fp64 of the dequantised operands, over the first rows of every group."""
    wrong = total = 0.0
    for g, size in enumerate(given.case.sizes):
        if size == 0:
            continue
        a, scale = given.rows_of(given.a, g, PROBED_ROWS), given.scales_of(g, PROBED_ROWS)
        exact = exact_product(a, scale, given.b[g], given.scale_b[g])
        wrong += float((given.rows_of(d, g, PROBED_ROWS).double() - exact).square().sum())
        total += float(exact.square().sum())
    return (wrong / total) ** 0.5


def _ours(given: Operands, out: Tensor) -> Callable[[], Any]:
    function = gemm.fp8_gemm_masked if given.masked else gemm.fp8_gemm_grouped
    return on("cuda", lambda: function(given.a, given.scale_a, given.b, given.scale_b, given.index, out=out))


def _cublaslt(given: Operands) -> Callable[[], Any]:
    vendors = []
    for g, size in enumerate(given.case.sizes):
        if size:
            scale = given.scales_of(g)
            padded = torch.ones(scale.shape[0], -(-size // 4) * 4, device="cuda")
            padded[:, :size] = scale
            vendors.append(VendorOperands.of(given.rows_of(given.a, g), padded, given.b[g], given.scale_b[g]))
    return lambda: [vendor.multiply(torch.bfloat16) for vendor in vendors]


def _grouped_bf16(given: Operands) -> Callable[[], Any]:
    ends = given.index[1:].clone()

    def call() -> Tensor:
        if given.masked:
            return torch.bmm(given.x, given.w.mT)  # no mask: all rows that there is room for
        return torch._grouped_mm(given.x, given.w.mT, offs=ends)

    return call


def _deepgemm(given: Operands, out: Tensor) -> Callable[[], Any]:
    case = given.case
    ids = torch.repeat_interleave(
        torch.arange(case.groups, dtype=torch.int32, device="cuda"), torch.tensor(case.sizes, device="cuda")
    ).int()

    def call() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        b = (given.b, given.scale_b)
        if given.masked:
            a = (given.a, given.scale_a.mT[:, : given.room])
            deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, out, given.index, case.rows)
            return
        if any(size % 128 for size in case.sizes):
            raise ValueError("groups of its contiguous layout are multiples of 128 rows")
        a = (given.a, given.scale_a.T[: given.a.shape[0]])
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, out, ids)

    return call


def measure(case: Case) -> Row:
    """One row of a ledger: ours beside the baselines; a baseline that cannot run says why."""
    given = Operands(case)
    outputs = {"ours": given.new_output(), "deepgemm": given.new_output()}
    candidates = {
        "ours": _ours(given, outputs["ours"]),
        "cublaslt": _cublaslt(given),
        "grouped-bf16": _grouped_bf16(given),
        "deepgemm": _deepgemm(given, outputs["deepgemm"]),
    }
    timed = compare(candidates)
    rows = sum(case.sizes)
    moved = sum(s > 0 for s in case.sizes) * case.n * case.k + rows * (case.k + 2 * case.n)
    add_rates(timed, 2.0 * rows * case.n * case.k, moved)
    for name, out in outputs.items():
        if "median_us" in timed[name]:
            timed[name]["rel_rms_bf16"] = error_of(given, out)
            timed[name]["correct"] = timed[name]["rel_rms_bf16"] < ROUNDED_BF16
    return {
        "kernel": case.kernel, "shape": case.shape, "floor_us": floor_us(case, *this_card()), "candidates": timed,
    }  # fmt: skip


def bench(shapes: Sequence[tuple[str, int, int, int, int]]) -> Data:
    """A step of the proof."""
    return step([measure(Case(*shape)) for shape in shapes])


def cases(quick: bool) -> list[Case]:
    """All of section 7.5, or one of each kind."""
    if quick:
        return [Case("uniform", 8, 1024, 4096, 7168), Case("masked", 6, 20, 7168, 2048)]
    packed = [
        Case(kind, groups, rows, n, k)
        for (n, k), groups, rows, kind in itertools.product(EXPERTS, GROUPS, ROWS, ("uniform", "zipf"))
    ]
    return packed + [
        Case("masked", g, rows, n, k) for (n, k), (g, rows) in itertools.product(EXPERTS, MASKED)
    ]


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.grouped", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
