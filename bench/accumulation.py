"""How much the tensor core's accumulator costs, and what promotion buys back (report 3.3.2).

    python -m bench.accumulation [--quick] [--json FILE]

One `fp8_gemm` call per cell, on random e4m3 operands with unit scales, against the exact product in float64.
Zero-mean data (N(0,1)) shows the error as relative RMS and as the maximum over the output's RMS; positive data
(U(0,1)) shows what cutting toward zero does to the mean. No GPU: the arithmetic is the model in
`deepseek_ops/reference/tensor_core.py`, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deepseek_ops.gemm import fp8_gemm

KS = (512, 1024, 2048, 4096, 7168, 16384)
MODES = {"exact": "fp32", "hopper": "promoted", "hopper_unpromoted": "un-promoted"}
SIZE = 64  # rows and columns of the output: 4096 samples


@dataclass(frozen=True)
class Cell:
    """Errors of one accumulation at one K."""

    k: int
    accumulation: str
    normal_rms: float  # N(0,1): RMS of the error / RMS of the output
    normal_max: float  # N(0,1): largest error / RMS of the output
    uniform_bias: float  # U(0,1): mean of the error / mean of the output


def _errors(data: torch.Tensor, accumulation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Error and exact product, fp64 [SIZE, SIZE], of data [2, SIZE, K] rounded to e4m3."""
    a, b = data.to(torch.float8_e4m3fn)
    slices = -(-a.shape[1] // 128)
    result = fp8_gemm(
        a,
        torch.ones(slices, SIZE),
        b,
        torch.ones(1, slices),
        out_dtype=torch.float32,
        accumulation=accumulation,
    )
    exact = a.double() @ b.double().T
    return result.double() - exact, exact


def measure(k: int, accumulation: str, seed: int = 0) -> Cell:
    """One cell of the table."""
    generator = torch.Generator().manual_seed(seed)
    error, exact = _errors(torch.randn(2, SIZE, k, generator=generator), accumulation)
    rms = exact.square().mean().sqrt()
    relative_rms, relative_max = error.square().mean().sqrt() / rms, error.abs().max() / rms
    error, exact = _errors(torch.rand(2, SIZE, k, generator=generator), accumulation)
    bias = error.mean() / exact.mean()
    return Cell(k, accumulation, relative_rms.item(), relative_max.item(), bias.item())


def table(cells: list[Cell]) -> str:
    """The cells as text, one line per K."""
    by_key = {(c.k, c.accumulation): c for c in cells}
    modes = [mode for mode in MODES if any(c.accumulation == mode for c in cells)]
    head = "N(0,1): relative RMS / maximum | U(0,1): bias of the mean"
    lines = [f"{'K':>6}" + "".join(f" | {MODES[mode]:>29}" for mode in modes) + f"   ({head})"]
    for k in sorted({c.k for c in cells}):
        row = [by_key[k, mode] for mode in modes]
        lines.append(
            f"{k:>6}"
            + "".join(f" | {c.normal_rms:.1e} / {c.normal_max:.1e} {c.uniform_bias:+10.3%}" for c in row)
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.accumulation", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="K up to 4096")
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model's tensors are small: threads would only wait for each other
    ks = [k for k in KS if k <= 4096 or not options.quick]
    cells = [measure(k, mode) for k in ks for mode in MODES]
    print(table(cells))
    if options.json is not None:
        record = {"experiment": "report 3.3.2", "size": SIZE, "cells": [asdict(c) for c in cells]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
