"""bf16 GEMM on a Hopper GPU beside cuBLAS: the shapes of DeepSeek-V3, of its experts, and their weight gradients.

    python -m bench.bf16_gemm [--quick] [--json FILE]

For each case, in one process and in turns, on random data with a cold L2: ours through the public function into a given
output, and what PyTorch offers (`torch.mm`, `torch.nn.functional.grouped_mm`). Floors: 2 M N K FLOP, and each operand and
result once. Results are compared with fp64 on a sample before they count. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import deepseek_ops
from bench.proof.measure import compare
from deepseek_ops import gemm as ops
from deepseek_ops._registry import absent_reason

BF16, FP32 = torch.bfloat16, torch.float32
# M, N, K: router, absorbed projections of MLA, output head, a dense layer, and few rows (section 7.5 of the research).
DENSE = [(4096, 256, 7168), (4096, 512, 128), (4096, 7168, 7168), (4096, 24576, 1536), (1024, 129280, 7168)]
FEW_ROWS = [(1, 256, 7168), (64, 7168, 7168), (16, 129280, 7168)]
# groups, rows of each, N, K of the experts.
GROUPED = [(8, 4096, 4096, 7168), (8, 4096, 7168, 2048), (32, 512, 4096, 7168)]
PEAK_FLOP_PER_CLOCK = 4096 * 132


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


def relative_rms(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((got.double() - exact).square().mean() / exact.square().mean()).sqrt())


def row_of(case: Case) -> dict[str, Any]:
    candidates, error = calls_of(case)

    def on_kernels() -> Any:
        with deepseek_ops.backend("cuda"):
            return candidates["ours"]()

    timed = compare({**candidates, "ours": on_kernels})
    for result in timed.values():
        if "median_us" in result:
            result["tflops"] = round(1e-6 * case.flop / result["median_us"], 2)
            result["gbps"] = round(1e-3 * case.bytes / result["median_us"], 1)
    if "median_us" in timed["ours"]:
        timed["ours"]["rel_rms"] = error()
        timed["ours"]["correct"] = timed["ours"]["rel_rms"] < 4e-3  # bf16 rounding alone is 1.1e-3 to 1.7e-3
    return {"kernel": "bf16_gemm", "shape": case.name, "candidates": timed}


def bench(quick: bool = False) -> dict[str, Any]:
    """A step of the proof."""
    rows = [row_of(case) for case in cases(quick)]
    parts = []
    for row in rows:
        ours = row["candidates"]["ours"]
        others = [v["median_us"] for k, v in row["candidates"].items() if k != "ours" and "median_us" in v]
        if "median_us" not in ours:
            return {"rows": rows, "summary": f"ours absent: {ours.get('absent', '')}"}
        ratio = f" {others[0] / ours['median_us']:.2f}x" if others else ""
        parts.append(f"{row['shape']} {ours['tflops']:.0f} TFLOP/s{ratio}")
    return {"rows": rows, "summary": "; ".join(parts)}


def floors(case: Case, gigahertz: float = 1.755, gbps: float = 3352) -> tuple[float, float]:
    """Microseconds that no version can beat on an H100 SXM: tensor cores, memory."""
    return 1e-3 * case.flop / (PEAK_FLOP_PER_CLOCK * gigahertz), 1e-3 * case.bytes / gbps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bf16_gemm", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    reason = absent_reason("cuda")
    print(f"{'case':<40} {'FLOP floor us':>14} {'byte floor us':>14}   (H100 SXM, 1.755 GHz, 3352 GB/s)")
    for case in cases(options.quick):
        flop, moved = floors(case)
        print(f"{case.name:<40} {flop:>14.1f} {moved:>14.1f}")
    if reason:
        print(f"no GPU to measure on: {reason}")
        return
    result = bench(options.quick)
    print(result["summary"])
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
