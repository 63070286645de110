"""bf16 GEMM on a Hopper GPU beside cuBLAS: the shapes of DeepSeek-V3, of its experts, and their weight gradients.

    python -m bench.bf16_gemm [--quick] [--only WORDS] [--json FILE]

For each case, in one process and in turns, on random data with a cold L2: ours through the public function into a given
output, and what PyTorch offers (`torch.mm`, `torch.nn.functional.grouped_mm`). Floors: 2 M N K FLOP, and each operand and
result once. Results are compared with fp64 on a sample before they count. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.proof.families.bf16_gemm import DENSE, FEW_ROWS, GROUPED
from bench.proof.measure import compare
from bench.proof.rows import (
    BF16_FLOP,
    ROUNDED_BF16,
    Floor,
    Row,
    add_rates,
    command,
    on,
    product_floor,
    relative_rms,
    step,
    this_card,
)
from bench.proof.steps import Data
from deepseek_ops import gemm as ops

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    kind: str  # gemm, wgrad, gemm_grouped, wgrad_grouped
    m: int
    n: int
    k: int
    groups: int = 1

    @property
    def name(self) -> str:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        return f"{self.kind} {groups}{self.m}x{self.n}x{self.k}"

    @property
    def flop(self) -> int:
        return 2 * self.groups * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        out = 4 if self.kind.startswith("wgrad") else 2
        return self.groups * (2 * self.k * (self.m + self.n) + out * self.m * self.n)


def cases(quick: bool) -> list[Case]:
    dense = [Case("gemm", *shape) for shape in DENSE + FEW_ROWS]
    dense += [Case("wgrad", n, k, m) for m, n, k in DENSE[2:4]]
    grouped = [Case("gemm_grouped", rows, n, k, groups) for groups, rows, n, k in GROUPED]
    grouped += [Case("wgrad_grouped", n, k, rows, groups) for groups, rows, n, k in GROUPED]
    return dense[:2] + grouped[:1] + grouped[3:4] if quick else dense + grouped


def offsets_of(case: Case, rows: int) -> torch.Tensor:
    """Ragged groups, none of them aligned."""
    generator = torch.Generator().manual_seed(case.groups)
    ends = torch.randint(0, rows, (case.groups - 1,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), ends, torch.tensor([rows])]).int().cuda()


def calls_of(case: Case) -> tuple[dict[str, Callable[[], Any]], Callable[[], float]]:
    """Candidates, and the relative RMS error of ours on a sample."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16)

    if case.groups == 1:
        if case.kind == "gemm":
            a, b, out = draw(case.m, case.k), draw(case.n, case.k), draw(case.m, case.n)
            ours, theirs = lambda: ops.gemm(a, b, out=out), lambda: torch.mm(a, b.T)
            exact = lambda: a[:64].double() @ b.double().T
        else:
            a, b = draw(case.k, case.m), draw(case.k, case.n)
            out = torch.zeros(case.m, case.n, device="cuda")
            ours, theirs = lambda: ops.wgrad(a, b, out=out), lambda: torch.mm(a.T, b)
            exact = lambda: a[:, :64].double().T @ b.double()
        return {"ours": ours, "cublas": theirs}, lambda: relative_rms(out[:64], exact())
    if case.kind == "gemm_grouped":
        rows = case.groups * case.m
        x, w, y = draw(rows, case.k), draw(case.groups, case.n, case.k), draw(rows, case.n)
        offsets = offsets_of(case, rows)
        last = slice(int(offsets[-2]), rows)
        return {
            "ours": lambda: ops.gemm_grouped(x, w, offsets, out=y),
            "torch": lambda: F.grouped_mm(x, w.mT, offs=offsets[1:]),
        }, lambda: relative_rms(y[last][:64], x[last][:64].double() @ w[-1].double().T)
    rows = case.groups * case.k
    x, dy, dw = (
        draw(rows, case.n),
        draw(rows, case.m),
        torch.zeros(case.groups, case.m, case.n, device="cuda"),
    )
    offsets = offsets_of(case, rows)
    last = slice(int(offsets[-2]), rows)
    return {
        "ours": lambda: ops.wgrad_grouped(dy, x, offsets, out=dw),
        "torch": lambda: F.grouped_mm(dy.mT, x, offs=offsets[1:]),
    }, lambda: relative_rms(dw[-1, :64], dy[last, :64].double().T @ x[last].double())


def floor_us(case: Case, *card: float) -> Floor:
    """Microseconds that no version can beat."""
    return product_floor(case.flop, case.bytes, BF16_FLOP, *card)


def measure(case: Case) -> Row:
    """Ours beside PyTorch's."""
    candidates, error = calls_of(case)
    timed = compare({**candidates, "ours": on("cuda", candidates["ours"])})
    add_rates(timed, case.flop, case.bytes)
    if "median_us" in timed["ours"]:
        timed["ours"]["rel_rms"] = error()
        timed["ours"]["correct"] = timed["ours"]["rel_rms"] < ROUNDED_BF16
    return {
        "kernel": "bf16_gemm", "shape": case.name, "floor_us": floor_us(case, *this_card()), "candidates": timed,
    }  # fmt: skip


def bench(quick: bool = False) -> Data:
    """A step of the proof."""
    return step([measure(case) for case in cases(quick)])


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.bf16_gemm", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
