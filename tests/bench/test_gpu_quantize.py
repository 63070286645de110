"""Quantisers, and what is done with codes, on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from bench.proof.families.quantize import CODED, QUANTISERS, SHARES
from bench.proof.rows import same_bits, tensors
from bench.quantize import arguments, op_of

from .gpu import draw, need_kernel, on_cpu, on_gpu, repeats, replays

pytestmark = pytest.mark.gpu


def special(tokens: int, hidden: int) -> torch.Tensor:
    """bf16 with every kind of tile: zeros, -0, subnormals, Inf, NaN, powers of two, a wide range."""
    generator = torch.Generator().manual_seed(tokens * 131 + hidden)
    x = torch.randn(tokens, hidden, generator=generator)
    x *= torch.exp2(torch.randint(-40, 40, (tokens, 1), generator=generator).float())
    rows = iter(range(0, max(tokens - 8, 0), 3))
    for values in (
        [0.0],
        [-0.0],
        [1e-39],
        [float("inf"), 1.0],
        [float("nan"), -2.0],
        [448.0, -448.0],
        [2.0**-118],
    ):
        row = next(rows, None)
        if row is not None:
            x[row] = torch.tensor(values).repeat(hidden)[:hidden]
    return x.to(torch.bfloat16)


SHAPES = [(1, 128), (7, 72), (128, 128), (129, 7168), (257, 576), (4097, 2048)]


def compare_with_reference(kernel: str, given: tuple) -> None:
    """Bytes; NaN of a value type equals NaN."""
    need_kernel(op_of(kernel).name)
    with deepseek_ops.backend("reference"):
        want = tensors(op_of(kernel)(*given))
    with deepseek_ops.backend("cuda"):
        got = on_cpu(op_of(kernel)(*on_gpu(given)))
    for g, w in zip(got, want, strict=True):
        if g.dtype == torch.bfloat16:
            g, w = (torch.where(v.isnan(), torch.nan, v) for v in (g, w))
        assert same_bits(g, w)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("kernel", QUANTISERS)
def test_quantiser_bytes(kernel: str, tokens: int, hidden: int, pow2: bool) -> None:
    """Bytes and scales equal the reference's on the CPU."""
    compare_with_reference(kernel, arguments(kernel, special(tokens, hidden), pow2))


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("kernel", CODED)
def test_coded_bytes(kernel: str, tokens: int, hidden: int) -> None:
    """Ops on codes that the reference made give the reference's bits."""
    with deepseek_ops.backend("reference"):
        given = arguments(kernel, special(tokens, hidden))
    compare_with_reference(kernel, given)


@pytest.mark.parametrize("kernel", SHARES)
def test_quantize_repeat(kernel: str) -> None:
    repeats(op_of(kernel), *arguments(kernel, draw(3000, 1408)))


@pytest.mark.parametrize("kernel", SHARES)
def test_quantize_graph(kernel: str) -> None:
    """Other values, and other codes and scales, between replays."""
    replays(op_of(kernel), *(arguments(kernel, draw(300, 576, seed=seed)) for seed in (0, 1)))
