"""fp8_gemm_grouped and fp8_gemm_masked on a Hopper GPU against their floor and against what a user would take instead.

    python -m bench.grouped [--quick] [--json FILE]

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

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.benchmarks import VendorOperands
from bench.proof.claims import nominal_bandwidth
from bench.proof.measure import compare
from bench.proof.steps import GROUPED_SHAPES
from deepseek_ops import gemm, quantize
from deepseek_ops._registry import absent_reason

BOOST_GHZ = 1.755  # of the data sheet: a bound, not a promise
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
    def name(self) -> str:
        return f"{self.kind} {self.groups}x{self.rows}x{self.n}x{self.k}"

    @property
    def sizes(self) -> list[int]:
        """Rows of each group; Zipf: rank r has a share of 1 / r, in an order that is neither rising nor falling."""
        if self.kind != "zipf":
            return [self.rows] * self.groups
        weight = [1 / (1 + g * 5 % self.groups) for g in range(self.groups)]
        return [int(self.rows * self.groups * w / sum(weight)) for w in weight]


def floor_us(case: Case, gbps: float, sms: int) -> dict[str, float]:
    """Microseconds that no version can beat, by arithmetic and by bytes; bf16 D."""
    rows, n, k = sum(case.sizes), case.n, case.k
    moved = sum(s > 0 for s in case.sizes) * n * k + rows * (k * (1 + 4 / 128) + 2 * n)
    return {"flops": 2.0 * rows * n * k / (sms * 8192 * BOOST_GHZ * 1e3), "bytes": moved / (gbps * 1e3)}


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
    """relative RMS against fp64 of the dequantised operands, over the first rows of every group"""
    wrong = total = 0.0
    for g, size in enumerate(given.case.sizes):
        if size == 0:
            continue
        a, scale = given.rows_of(given.a, g, PROBED_ROWS), given.scales_of(g, PROBED_ROWS)
        left = a.double() * scale.double().T.repeat_interleave(128, 1)[:, : a.shape[1]]
        blocks = given.scale_b[g].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        exact = left @ (given.b[g].double() * blocks[: given.case.n, : given.case.k]).T
        wrong += float((given.rows_of(d, g, PROBED_ROWS).double() - exact).square().sum())
        total += float(exact.square().sum())
    return (wrong / total) ** 0.5


def _ours(given: Operands, out: Tensor) -> Callable[[], Any]:
    function = gemm.fp8_gemm_masked if given.masked else gemm.fp8_gemm_grouped

    def call() -> None:
        with deepseek_ops.backend("cuda"):
            function(given.a, given.scale_a, given.b, given.scale_b, given.index, out=out)

    return call


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


def measure(case: Case) -> dict[str, Any]:
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
    moved = 1e-3 * sum(s > 0 for s in case.sizes) * case.n * case.k + 1e-3 * rows * (case.k + 2 * case.n)
    for name, result in timed.items():
        if "median_us" not in result:
            continue
        result["tflops"] = round(2e-6 * rows * case.n * case.k / result["median_us"], 2)
        result["sustained_tflops"] = round(2e-6 * rows * case.n * case.k / result["sustained"]["mean_us"], 2)
        result["gbps"] = round(moved / result["median_us"], 1)
        if name in outputs:
            result["rel_rms_bf16"] = error_of(given, outputs[name])
            result["correct"] = result["rel_rms_bf16"] < 4e-3  # bf16 rounding alone is 1.1e-3 to 1.7e-3
    properties = torch.cuda.get_device_properties(0)
    gbps = nominal_bandwidth(properties.name)
    floor = floor_us(case, gbps, properties.multi_processor_count) if gbps else {}
    kernel = "fp8_gemm_masked" if given.masked else "fp8_gemm_grouped"
    return {"kernel": kernel, "shape": case.name, "floor_us": floor, "candidates": timed}


def bench(group: str) -> dict[str, Any]:
    """One group of shapes of the proof (bench/proof/steps.py)."""
    rows = [measure(Case(*shape)) for shape in GROUPED_SHAPES[group]]
    return {"rows": rows, "summary": "; ".join(line(row) for row in rows)}


def line(row: dict[str, Any]) -> str:
    """ours and the ratios to it, or why it is absent"""
    ours = row["candidates"]["ours"]
    if "median_us" not in ours:
        return f"{row['shape']} absent: {ours.get('absent', '')}"
    ratios = [
        f"{other['median_us'] / ours['median_us']:.2f}x {name}"
        for name, other in row["candidates"].items()
        if name != "ours" and "median_us" in other
    ]
    wrong = "" if ours["correct"] else " WRONG"
    floor = max(row["floor_us"].values(), default=0.0)
    share = f", floor {floor:.1f} us" if floor else ""
    return f"{row['shape']} {ours['median_us']:.1f} us{share}, {ours['tflops']:.0f} TFLOP/s {' '.join(ratios)}{wrong}"


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.grouped", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    parser.add_argument("--json", type=Path, help="write all rows there")
    options = parser.parse_args(arguments)
    reason = absent_reason("cuda")
    if reason:
        print(f"no GPU measurement: backend cuda: {reason}")
        return 1
    rows = []
    for case in cases(options.quick):
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["candidates"]["ours"].get("correct") for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
