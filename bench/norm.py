"""The RMSNorm kernels on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.norm [--quick] [--only WORDS] [--json FILE]

bf16 activations, as bench/quantize.py measures them; the weight is bf16 too. Results are compared with the model on a
small input, up to the device's 1/sqrt. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.proof import memory_bound
from bench.proof.families.norm import SHARES
from bench.proof.memory_bound import Case
from bench.proof.rows import command, difference
from bench.proof.steps import Data
from deepseek_ops._registry import OPS

TOKENS = (128, 4096, 16384, 65536)
WIDTHS = (512, 1536, 7168)  # latents of keys and queries, hidden
SAMPLE = (300, 7168)
# Elements of bf16 and e4m3 that may round elsewhere because 1/sqrt is within 2^-22 and not correctly rounded.
SHARE = 2e-3
near = partial(difference, share=SHARE)


def arguments(kernel: str, tokens: int, width: int, device: str, seed: int = 0) -> tuple[Any, ...]:
    """What the op of `kernel` takes, drawn on the CPU where bits matter to a test, on the device otherwise."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed + tokens + width)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)

    x, residual, weight = draw(tokens, width), draw(tokens, width), draw(width)
    match kernel:
        case "rms_norm":
            return x, weight, 1e-6
        case "rms_norm_residual":
            return x, residual, weight, 1e-6
        case "rms_norm_quantize":
            return x, weight, 1e-6, False
        case "rms_norm_residual_quantize":
            return x, residual, weight, 1e-6, False
        case "rms_norm_backward":
            rstd = (x.float().square().mean(-1) + 1e-6).rsqrt()
            return draw(tokens, width), x, weight, rstd, residual
    raise KeyError(kernel)


def case(kernel: str, tokens: int, width: int) -> Case:
    """A kernel on random activations of a shape."""
    draw, sample = (partial(arguments, kernel, *shape) for shape in ((tokens, width), SAMPLE))
    return Case(kernel, f"{tokens}x{width}", OPS[kernel], draw, sample, truth="modelled", differs=near)


def cases(quick: bool) -> list[Case]:
    """Every kernel on every shape."""
    shapes = [(4096, 7168)] if quick else list(itertools.product(TOKENS, WIDTHS))
    return [case(kernel, *shape) for kernel in SHARES for shape in shapes]


def bench(shapes: Sequence[tuple[int, int]]) -> Data:
    """A step of the proof."""
    return memory_bound.bench(case(kernel, *shape) for shape in shapes for kernel in SHARES)


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.norm", __doc__, cases, memory_bound.measure, memory_bound.floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
