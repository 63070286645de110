"""The SwiGLU kernels on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.activation [--quick] [--only WORDS] [--json FILE]

bf16 activations with routing weights, as bench/quantize.py measures them. Results are compared with the model on a small
input, up to the device's e^x and 1/x. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.proof import memory_bound
from bench.proof.families.activation import OPS as KERNELS
from bench.proof.families.activation import SHARES
from bench.proof.memory_bound import Case
from bench.proof.rows import command, difference
from bench.proof.steps import Data
from bench.quantize import offsets_of
from deepseek_ops import quantize
from deepseek_ops._registry import OPS, Op

TOKENS = (128, 4096, 32768)
INNER = (2048, 18432)  # experts, dense layers
SAMPLE = (300, 512)
# Elements of bf16 and e4m3 that may round elsewhere because e^x is within 2^-21 and 1/x within 2^-22.
SHARE = 5e-3
near = partial(difference, share=SHARE)


def op_of(kernel: str) -> Op:
    """The op behind a kernel's name."""
    return OPS[KERNELS[kernel][0]]


def arguments(kernel: str, tokens: int, inner: int, device: str, seed: int = 0) -> tuple[Any, ...]:
    """What the op of `kernel` takes."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed + tokens + inner)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    gate_up = (draw(tokens, 2 * inner) * 2).to(torch.bfloat16)
    weight, dy = draw(tokens).sigmoid(), draw(tokens, inner).to(torch.bfloat16)
    match kernel:
        case "swiglu":
            return gate_up, weight
        case "swiglu_quantize":
            return gate_up, weight, False
        case "swiglu_backward":
            return dy, gate_up, weight
        case "swiglu_backward_quantize":
            return dy, gate_up, None, weight, False
        case "swiglu_backward_quantize_fp8":
            return dy, *quantize.quantize_1x128(gate_up), weight, False
        case "swiglu_backward_quantize_grouped":
            return dy, gate_up, None, weight, offsets_of(dy), False
    raise KeyError(kernel)


def case(kernel: str, tokens: int, inner: int) -> Case:
    """A kernel on random activations of a shape."""
    draw, sample = (partial(arguments, kernel, *shape) for shape in ((tokens, inner), SAMPLE))
    return Case(kernel, f"{tokens}x{inner}", op_of(kernel), draw, sample, truth="modelled", differs=near)


def cases(quick: bool) -> list[Case]:
    """Every kernel on every shape."""
    shapes = [(4096, 2048)] if quick else list(itertools.product(TOKENS, INNER))
    return [case(kernel, *shape) for kernel in SHARES for shape in shapes]


def bench(shapes: Sequence[tuple[int, int]]) -> Data:
    """A step of the proof."""
    return memory_bound.bench(case(kernel, *shape) for shape in shapes for kernel in SHARES)


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.activation", __doc__, cases, memory_bound.measure, memory_bound.floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
