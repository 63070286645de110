"""FP8 decoding products on a Hopper GPU: microseconds, and bytes of the weights a second against what memory allows.

    python -m bench.decode [--quick] [--only WORDS] [--json FILE]

For each shape of DeepSeek-V3, in one process and in turns, on random data with a cold L2:

- ours         `fp8_gemm_decode` (split_k as chosen), or `fp8_gemm_masked_decode` for a batch of experts, into `out`
- prefetched   the same with `prefetch_weights=True`: what overlapping the kernel before can give
- fp8_gemm     our kernel for any number of rows
- cublaslt     cuBLASLt blockwise; for a batch a loop over experts whose sizes the host knows, which a server does not
- deepgemm     DeepGEMM, where it is installed
- cublas-bf16  torch.mm on bf16 operands: twice the bytes

The floor is the weights read once (and the little else) at the data sheet's bandwidth. The result is compared with fp64
where time is measured. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.families.decode import MASKED_SHAPES, SHAPES
from bench.proof.measure import compare
from bench.proof.rows import GBPS, Floor, Row, add_rates, command, on, step, this_card
from bench.proof.steps import Data
from bench.proof.vendor import VendorOperands, deepgemm, exact_product, judge, judge_precise
from deepseek_ops import gemm, quantize
from deepseek_ops._gemm_checks import choose_split_k


@dataclass(frozen=True)
class Case:
    """`rows` of each of `groups` experts with room for `room`; no room: one product."""

    rows: int
    n: int
    k: int
    groups: int = 1
    room: int = 0

    @property
    def kernel(self) -> str:
        """The op."""
        return "fp8_gemm_masked_decode" if self.room else "fp8_gemm_decode"

    @property
    def shape(self) -> str:
        """As a ledger has it."""
        rows = f"{self.groups}x{self.rows}/{self.room}" if self.room else f"{self.rows}"
        return f"{rows}x{self.n}x{self.k}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel} {self.shape}"

    @property
    def floor_bytes(self) -> int:
        """What any version must read and write: weights with their scales, rows of each group in, and of bf16 out."""
        rows, n, k = self.rows, self.n, self.k
        blocks, columns = -(-n // 128), -(-k // 128)
        return self.groups * (n * k + 4 * blocks * columns + rows * k + 4 * rows * columns + 2 * rows * n)


def floor_us(case: Case, gbps: float = GBPS) -> Floor:
    """Microseconds at the data sheet's bandwidth."""
    return {"bytes": case.floor_bytes / (gbps * 1e3)}


def _weights(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    with deepseek_ops.backend("reference"):
        return (w, *quantize.quantize_128x128(w))


def _rows(m: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    with deepseek_ops.backend("reference"):
        return (x, *quantize.quantize_1x128(x))


def _row(case: Case, timed: dict[str, Row]) -> Row:
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "input_bytes": case.groups * case.n * case.k,
        "floor_us": floor_us(case, this_card()[0]),
        "candidates": timed,
    }


def _single(case: Case) -> Row:
    """One product and its baselines; a baseline that cannot run says why."""
    m, n, k = case.rows, case.n, case.k
    x, a, scale_a = _rows(m, k, m)
    w, b, scale_b = _weights(n, k, n + k)
    given = a, scale_a, b, scale_b
    outputs: dict[str, Tensor] = {
        name: torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        for name in ("ours", "prefetched", "fp8_gemm")
    }
    vendor = VendorOperands.of(*given)

    def cublaslt() -> None:
        outputs["cublaslt"] = vendor.multiply(torch.bfloat16)

    timed = compare(
        {
            "ours": on("cuda", lambda: gemm.fp8_gemm_decode(*given, out=outputs["ours"])),
            "prefetched": on(
                "cuda", lambda: gemm.fp8_gemm_decode(*given, out=outputs["prefetched"], prefetch_weights=True)
            ),
            "fp8_gemm": on("cuda", lambda: gemm.fp8_gemm(*given, out=outputs["fp8_gemm"])),
            "cublaslt": cublaslt,
            "deepgemm": deepgemm(*given, outputs),
            "cublas-bf16": lambda: torch.mm(x, w.T),
        }
    )
    exact = exact_product(*given)
    add_rates(timed, size=case.floor_bytes)
    judge(timed, outputs, exact)
    timed["cublas-bf16"].pop("gbps", None)  # it reads other bytes
    if "median_us" in timed["ours"]:
        precise = on("cuda", lambda: gemm.fp8_gemm_decode(*given, out_dtype=torch.float32))()
        judge_precise(timed["ours"], precise, exact)
    return {**_row(case, timed), "split_k": choose_split_k(n, k)}


def _masked(case: Case) -> Row:
    """A batch of experts."""
    groups, rows, room, n, k = case.groups, case.rows, case.room, case.n, case.k
    pieces = [_rows(room, k, g) for g in range(groups)]
    a = torch.stack([p[1].view(torch.uint8) for p in pieces]).view(torch.float8_e4m3fn)
    scale_a = torch.stack([p[2] for p in pieces])
    experts = [_weights(n, k, g)[1:] for g in range(groups)]
    b = torch.stack([e[0].view(torch.uint8) for e in experts]).view(torch.float8_e4m3fn)
    scale_b = torch.stack([e[1] for e in experts])
    masked_m = torch.full((groups,), rows, device="cuda", dtype=torch.int32)
    out = torch.empty(groups, room, n, device="cuda", dtype=torch.bfloat16)
    theirs = torch.empty_like(out)
    vendors = [
        VendorOperands.of(a[g, :rows], scale_a[g, :, : -(-rows // 4) * 4].contiguous(), b[g], scale_b[g])
        for g in range(groups)
    ]

    def deepgemm_masked() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        scales = scale_a.mT[:, :room]
        deep_gemm.m_grouped_fp8_gemm_nt_masked((a, scales), (b, scale_b), theirs, masked_m, rows)

    timed = compare(
        {
            "ours": on(
                "cuda", lambda: gemm.fp8_gemm_masked_decode(a, scale_a, b, scale_b, masked_m, out=out)
            ),
            "cublaslt": lambda: [vendor.multiply(torch.bfloat16) for vendor in vendors],
            "deepgemm": deepgemm_masked,
        }
    )
    last = groups - 1
    exact = exact_product(a[last, :rows], scale_a[last, :, :rows], b[last], scale_b[last])
    add_rates(timed, size=case.floor_bytes)
    judge(timed, {"ours": out[last, :rows], "deepgemm": theirs[last, :rows]}, exact)
    return _row(case, timed)


def measure(case: Case) -> Row:
    """Ours beside the baselines."""
    return _masked(case) if case.room else _single(case)


def _cases(
    shapes: Sequence[tuple[int, int, int]], masked: Sequence[tuple[int, int, int, int, int]]
) -> list[Case]:
    batches = [Case(rows, n, k, groups, room) for groups, rows, room, n, k in masked]
    return [*(Case(*shape) for shape in shapes), *batches]


def cases(quick: bool) -> list[Case]:
    """The proof's shapes, or two of each kind."""
    last = 2 if quick else None
    return _cases(SHAPES[:last], MASKED_SHAPES[:last])


def bench(shapes: Sequence[tuple[int, int, int]], masked: Sequence[tuple[int, int, int, int, int]]) -> Data:
    """A step of the proof."""
    rows = []
    for case in _cases(shapes, masked):
        rows.append(measure(case))
        torch.cuda.empty_cache()
    return step(rows)


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.decode", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
