"""fp8_wgrad and fp8_wgrad_grouped on a Hopper GPU against their floor and against what a user would take instead.

    python -m bench.wgrad [--quick] [--grouped | --dense] [--json FILE]

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

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.claims import nominal_bandwidth
from bench.proof.measure import compare
from bench.proof.steps import WGRAD_GROUPED_SHAPES, WGRAD_SHAPES
from deepseek_ops import gemm, quantize
from deepseek_ops._registry import absent_reason

BOOST_GHZ = 1.755  # of the data sheet: a bound, not a promise
CORNER = 128  # rows and columns of D that are compared with fp64


def floor_us(m: int, n: int, tokens: int, groups: int, gbps: float, sms: int) -> dict[str, float]:
    """Microseconds that no version can beat, by arithmetic and by bytes; fp32 D read and written."""
    flops = 2.0 * m * n * tokens
    moved = (m + n) * tokens * (1 + 4 / 128) + 8.0 * groups * m * n
    return {"flops": flops / (sms * 8192 * BOOST_GHZ * 1e3), "bytes": moved / (gbps * 1e3)}


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


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """Of the error, against the exact values."""
    error = got[:CORNER, :CORNER].double() - exact
    return float((error.square().mean() / exact.square().mean()).sqrt())


def on_cuda(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    """The call on our kernels."""

    def call() -> Tensor:
        with deepseek_ops.backend("cuda"):
            return function(*args, **kwargs)

    return call


def dense_row(m: int, n: int, tokens: int) -> dict[str, Any]:
    """One [m, n] gradient over tokens."""
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
        "ours": on_cuda(gemm.fp8_wgrad, *given, out=total, accumulate=True),
        "ours-overwrite": on_cuda(gemm.fp8_wgrad, *given, out=out),
        "cublaslt": cublaslt,
        "deepgemm": deepgemm,
        "cublas-bf16": lambda: torch.mm(dy.T, x),
    }
    timed = compare(candidates)
    error = relative_rms(out, corner64(given, slice(0, tokens)))
    return _row("fp8_wgrad", m, n, tokens, 1, timed, error)


def grouped_row(groups: int, m: int, n: int, tokens: int, ragged: bool) -> dict[str, Any]:
    """[groups, m, n] over `tokens` of each group, or as many in all, unevenly."""
    sizes = [tokens] * groups
    if ragged:  # Zipf in whole tiles of 128, the same total
        weights = [1 / (g + 1) for g in range(groups)]
        sizes = [int(w / sum(weights) * tokens * groups) // 128 * 128 for w in weights]
        sizes[0] += tokens * groups - sum(sizes)
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
        "ours": on_cuda(gemm.fp8_wgrad_grouped, *given, offsets, out=total, accumulate=True),
        "ours-overwrite": on_cuda(gemm.fp8_wgrad_grouped, *given, offsets, out=out),
        "deepgemm": deepgemm,
        "cublas-bf16": lambda: torch._grouped_mm(dy.T, x, offs=offsets[1:]),
    }
    timed = compare(candidates)
    error = max(
        relative_rms(out[g], corner64(given, slice(*pair)))
        for g, pair in enumerate(itertools.pairwise(bounds))
        if pair[0] < pair[1]
    )
    row = _row("fp8_wgrad_grouped", m, n, bounds[-1], groups, timed, error)
    row["shape"] += " zipf" if ragged else ""
    return row


def _row(
    kernel: str, m: int, n: int, tokens: int, groups: int, timed: dict[str, Any], error: float
) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    gbps = nominal_bandwidth(torch.cuda.get_device_name(0)) or 3352
    for result in timed.values():
        if "median_us" in result:
            result["tflops"] = round(2e-6 * m * n * tokens / result["median_us"], 2)
            result["sustained_tflops"] = round(2e-6 * m * n * tokens / result["sustained"]["mean_us"], 2)
    for name in ("ours", "ours-overwrite"):
        timed[name] |= {"rel_rms": error, "correct": error <= 3e-4}
    shape = f"{m}x{n}x{tokens}" + (f" in {groups} groups" if groups > 1 else "")
    floor = floor_us(m, n, tokens, groups, gbps, properties.multi_processor_count)
    return {"kernel": kernel, "shape": shape, "candidates": timed, "floor_us": floor}


def bench_dense() -> dict[str, Any]:
    """The step bench-fp8_wgrad of the proof."""
    rows = [dense_row(*shape) for shape in WGRAD_SHAPES]
    return {"rows": rows, "summary": "; ".join(line(row) for row in rows)}


def bench_grouped() -> dict[str, Any]:
    """The step bench-fp8_wgrad_grouped of the proof."""
    rows = [grouped_row(*shape, ragged) for shape in WGRAD_GROUPED_SHAPES for ragged in (False, True)]
    return {"rows": rows, "summary": "; ".join(line(row) for row in rows)}


def line(row: dict[str, Any]) -> str:
    """Medians of one shape, and the floor."""
    floor = max(row["floor_us"].values())
    parts = [f"{row['kernel']} {row['shape']}: floor {floor:.1f} us"]
    for name, result in row["candidates"].items():
        if "median_us" in result:
            parts.append(f"{name} {result['median_us']:.1f} us {result.get('tflops', 0):.0f} TFLOP/s")
        else:
            parts.append(f"{name} absent ({result.get('absent', '')[:60]})")
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.wgrad", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dense", action="store_true", help="only fp8_wgrad")
    kind.add_argument("--grouped", action="store_true", help="only fp8_wgrad_grouped")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    reason = absent_reason("cuda")
    if reason:
        print(f"no GPU to measure on: backend 'cuda' is absent here: {reason}")
        return
    rows = []
    count = 1 if options.quick else None
    if not options.grouped:
        rows += [dense_row(*shape) for shape in WGRAD_SHAPES[:count]]
    if not options.dense:
        rows += [grouped_row(*shape, r) for shape in WGRAD_GROUPED_SHAPES[:count] for r in (False, True)]
    for row in rows:
        print(line(row))
    if options.json is not None:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(0), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
