"""fp8_wgrad and fp8_wgrad_grouped on a Hopper GPU against their floor and against what a user would take instead.

    python -m bench.wgrad [--quick] [--only WORDS] [--json FILE]

Random data, cold L2, medians of turns in one process, then most of a second back to back (bench/proof/measure.py). D is
fp32 and accumulated into, which is what training does; a line per baseline says where it cannot:

- ours             D += A B^T over tokens
- ours-overwrite   D  = A B^T
- cublaslt         dense: scaled_mm with 1x128 scales of both operands, then D.add_(): it has no accumulate
- cublas-bf16      dense: D.addmm_ of bf16 operands in fp32 is not there, so mm to bf16; grouped: torch._grouped_mm
- deepgemm         its 1D1D kernels, where the package can be imported; accumulate in fp32 as ours

The floor is max(FLOPs at 8192 per SM and clock at the boost clock, bytes at the data sheet's bandwidth); bytes: operands and
scales once, D read and written. Correctness against the fp64 product of a corner is asserted where time is measured.
Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.families.wgrad import GROUPED_SHAPES, SHAPES
from bench.proof.measure import compare
from bench.proof.rows import (
    EXACT_FP8,
    FP8_FLOP,
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
from deepseek_ops import gemm, quantize

CORNER = 128  # rows and columns of D that are compared with fp64


@dataclass(frozen=True)
class Case:
    """[m, n] over `tokens`, or [groups, m, n] over as many of each group on average."""

    m: int
    n: int
    tokens: int
    groups: int = 0
    ragged: bool = False

    @property
    def kernel(self) -> str:
        """The op."""
        return "fp8_wgrad_grouped" if self.groups else "fp8_wgrad"

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group; ragged: Zipf in whole tiles of 128, the same total."""
        if not self.ragged:
            return [self.tokens] * max(self.groups, 1)
        weights, total = [1 / (g + 1) for g in range(self.groups)], self.tokens * self.groups
        sizes = [int(w / sum(weights) * total) // 128 * 128 for w in weights]
        sizes[0] += total - sum(sizes)
        return sizes

    @property
    def shape(self) -> str:
        """As a ledger has it."""
        groups = f" in {self.groups} groups" if self.groups else ""
        return f"{self.m}x{self.n}x{sum(self.sizes)}{groups}{' zipf' if self.ragged else ''}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel} {self.shape}"

    @property
    def flop(self) -> float:
        """Of all products."""
        return 2.0 * self.m * self.n * sum(self.sizes)


def floor_us(case: Case, *card: float) -> Floor:
    """Microseconds that no version can beat; fp32 D read and written."""
    moved = (case.m + case.n) * sum(case.sizes) * (1 + 4 / 128) + 8.0 * max(case.groups, 1) * case.m * case.n
    return product_floor(case.flop, moved, FP8_FLOP, *card)


def operands(m: int, n: int, tokens: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """bf16 dy [tokens, m] and x [tokens, n], and both as fp8_wgrad wants them."""
    generator = torch.Generator("cuda").manual_seed(m * 7 + n * 3 + tokens)
    dy, x = (
        torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, generator=generator) for size in (m, n)
    )
    with deepseek_ops.backend("reference"):
        (a, scale_a), (b, scale_b) = quantize.quantize_128x1(dy), quantize.quantize_128x1(x)
    return dy, x, (a, scale_a, b, scale_b)


def corner64(given: tuple[Tensor, ...], tokens: slice) -> Tensor:
    """fp64 of the dequantised operands, for the first rows and columns of D."""
    a, scale_a, b, scale_b = given
    tiles = slice(tokens.start // 128, -(-tokens.stop // 128))
    left, right = (
        q[:CORNER, tokens].double()
        * scale[tiles, : q[:CORNER].shape[0]]
        .double()
        .T.repeat_interleave(128, 1)[:, : tokens.stop - tokens.start]
        for q, scale in ((a, scale_a), (b, scale_b))
    )
    return left @ right.T


def error_of(got: Tensor, exact: Tensor) -> float:
    """Relative RMS of the corner."""
    return relative_rms(got[:CORNER, :CORNER], exact)


def _dense(case: Case) -> Row:
    """One [m, n] gradient over tokens."""
    m, n, tokens = case.m, case.n, case.tokens
    dy, x, given = operands(m, n, tokens)
    a, scale_a, b, scale_b = given
    out, total, theirs = (torch.zeros(m, n, device="cuda") for _ in range(3))
    recipe = torch.nn.functional.ScalingType

    def cublaslt() -> None:
        product = torch.nn.functional.scaled_mm(
            a, b.T, scale_a.T, recipe.BlockWise1x128, scale_b.T, recipe.BlockWise1x128, output_dtype=torch.float32
        )  # fmt: skip
        total.add_(product)

    def deepgemm() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        deep_gemm.fp8_gemm_nt((a, scale_a.T), (b, scale_b.T), theirs, c=theirs, recipe=(1, 1, 128))

    candidates = {
        "ours": on("cuda", lambda: gemm.fp8_wgrad(a, scale_a, b, scale_b, out=total, accumulate=True)),
        "ours-overwrite": on("cuda", lambda: gemm.fp8_wgrad(a, scale_a, b, scale_b, out=out)),
        "cublaslt": cublaslt,
        "deepgemm": deepgemm,
        "cublas-bf16": lambda: torch.mm(dy.T, x),
    }
    timed = compare(candidates)
    return _row(case, timed, error_of(out, corner64(given, slice(0, tokens))))


def _grouped(case: Case) -> Row:
    """[groups, m, n] over the tokens of each group."""
    groups, m, n, sizes = case.groups, case.m, case.n, case.sizes
    bounds = [0, *itertools.accumulate(sizes)]
    dy, x, given = operands(m, n, bounds[-1])
    a, scale_a, b, scale_b = given
    offsets = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out, total, theirs = (torch.zeros(groups, m, n, device="cuda") for _ in range(3))

    # DeepGEMM's operands are concatenated blocks; its quantiser could write them, so that the copy is not timed.
    left, right = (torch.cat([q[:, i:j].reshape(-1) for i, j in itertools.pairwise(bounds)]) for q in (a, b))
    on_device = offsets[1:] - offsets[:-1]

    def deepgemm() -> None:
        import deep_gemm  # absent on most machines: compare() notes that

        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (left, scale_a.T), (right, scale_b.T), theirs, sizes, on_device, theirs
        )

    candidates = {
        "ours": on(
            "cuda",
            lambda: gemm.fp8_wgrad_grouped(a, scale_a, b, scale_b, offsets, out=total, accumulate=True),
        ),
        "ours-overwrite": on(
            "cuda", lambda: gemm.fp8_wgrad_grouped(a, scale_a, b, scale_b, offsets, out=out)
        ),
        "deepgemm": deepgemm,
        "cublas-bf16": lambda: torch._grouped_mm(dy.T, x, offs=offsets[1:]),
    }
    timed = compare(candidates)
    error = max(
        error_of(out[g], corner64(given, slice(*pair)))
        for g, pair in enumerate(itertools.pairwise(bounds))
        if pair[0] < pair[1]
    )
    return _row(case, timed, error)


def _row(case: Case, timed: dict[str, Row], error: float) -> Row:
    add_rates(timed, case.flop)
    for name in ("ours", "ours-overwrite"):
        timed[name] |= {"rel_rms": error, "correct": error <= EXACT_FP8}
    return {
        "kernel": case.kernel, "shape": case.shape, "floor_us": floor_us(case, *this_card()), "candidates": timed,
    }  # fmt: skip


def measure(case: Case) -> Row:
    """Ours beside the baselines."""
    return _grouped(case) if case.groups else _dense(case)


def _cases(dense: Sequence[tuple[int, int, int]], grouped: Sequence[tuple[int, int, int, int]]) -> list[Case]:
    even_and_ragged = [
        Case(m, n, tokens, groups, ragged) for groups, m, n, tokens in grouped for ragged in (False, True)
    ]
    return [*(Case(*shape) for shape in dense), *even_and_ragged]


def cases(quick: bool) -> list[Case]:
    """The proof's shapes, or one of each kind."""
    last = 1 if quick else None
    return _cases(SHAPES[:last], GROUPED_SHAPES[:last])


def bench(dense: Sequence[tuple[int, int, int]], grouped: Sequence[tuple[int, int, int, int]]) -> Data:
    """A step of the proof."""
    return step([measure(case) for case in _cases(dense, grouped)])


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.wgrad", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
