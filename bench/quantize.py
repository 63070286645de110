"""The quantisers' kernels on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.quantize [--quick] [--only WORDS] [--json FILE]

In one process and in turns, on random data with a cold L2 (bench/proof/measure.py): ours through the op, `copy_` of a
tensor that moves as many bytes, the ceiling that memory allows on this machine, and eager PyTorch, the reference on
the same GPU. The floor is what any version must
read and write: arguments once, outputs once. Bytes are compared with the reference's on a small input of the same kind.
Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.proof import memory_bound
from bench.proof.families.quantize import OPS as KERNELS
from bench.proof.families.quantize import QUANTISERS, SHARES
from bench.proof.memory_bound import Case
from bench.proof.rows import command
from bench.proof.steps import Data
from deepseek_ops import quantize
from deepseek_ops._registry import OPS, Op

TOKENS = (128, 4096, 16384, 65536)
HIDDEN = (2048, 4096, 7168, 18432)
# (N, K) of the model's weights: research/gemm-quant.md section 7.5.
WEIGHTS = (
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168),
)  # fmt: skip
SAMPLE = (300, 576)  # short tiles at both ends
GROUPS = 8


def op_of(kernel: str) -> Op:
    """The op behind a kernel's name."""
    return OPS[KERNELS[kernel][0]]


def offsets_of(x: Tensor) -> Tensor:
    """Groups of uneven sizes, one empty, some rows of no group."""
    tokens = x.shape[0]
    bounds = [0, *(tokens * (g * g) // (GROUPS * GROUPS + 1) for g in range(1, GROUPS + 1))]
    bounds[3] = bounds[2]
    return torch.tensor(bounds, dtype=torch.int32).to(x.device)


def arguments(kernel: str, x: Tensor, pow2: bool = False) -> tuple[Any, ...]:
    """What the op of `kernel` takes for the values x: x itself, or codes of it."""
    groups = (offsets_of(x),) if kernel.endswith("_grouped") else ()
    if kernel in QUANTISERS:
        return (x, *groups, pow2, *((False,) if kernel == "quantize_1x128" else ()))
    hidden, bf16 = x.shape[1], torch.bfloat16
    match kernel.removesuffix("_grouped"):
        case "pack_e5m6":
            return x, "tile"
        case "pack_e5m6_row":
            return x, "row"
        case "unpack_e5m6":
            return *quantize.pack_e5m6(x), hidden, "tile", bf16
        case "requantize_e5m6_128x1":
            return *quantize.pack_e5m6(x), hidden, *groups
        case "requantize_128x1":
            return *quantize.quantize_1x128(x, pow2=True), *groups
        case "transpose_128x128":
            return quantize.quantize_128x128(x)
        case "dequantize_1x128":
            return *quantize.quantize_1x128(x), bf16
        case "dequantize_128x1":
            return *quantize.quantize_128x1(x), x.shape[0], bf16
        case "dequantize_128x128":
            return *quantize.quantize_128x128(x), bf16
    raise KeyError(kernel)


def case(kernel: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A kernel on random values of a shape."""

    def draw(shape: tuple[int, int], device: str) -> tuple[Any, ...]:
        return arguments(kernel, torch.randn(shape, device=device, dtype=dtype))

    name = f"{rows}x{columns}" + (" fp32" if dtype == torch.float32 else "")
    return Case(kernel, name, op_of(kernel), partial(draw, (rows, columns)), partial(draw, SAMPLE))


def cases(quick: bool) -> list[Case]:
    """Activations for tiles of rows and columns, weights for blocks."""
    tokens, hidden = (TOKENS[:3:2], HIDDEN[2:3]) if quick else (TOKENS, HIDDEN)
    found = []
    for kernel in SHARES:
        blocks = kernel.endswith("_128x128")
        shapes = WEIGHTS[: 2 if quick else None] if blocks else itertools.product(tokens, hidden)
        dtypes = (torch.bfloat16, torch.float32) if kernel == "quantize_128x128" else (torch.bfloat16,)
        found += [case(kernel, *shape, dtype) for shape in shapes for dtype in dtypes]
    return found


def bench(shapes: Sequence[tuple[int, int]]) -> Data:
    """A step of the proof."""
    return memory_bound.bench(case(kernel, *shape) for shape in shapes for kernel in SHARES)


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.quantize", __doc__, cases, memory_bound.measure, memory_bound.floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
