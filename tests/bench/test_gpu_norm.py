"""RMSNorm on silicon: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from bench.norm import SHARE, arguments
from bench.proof.families.norm import SHARES
from bench.proof.rows import difference, same_bits, tensors
from deepseek_ops import quantize
from deepseek_ops._registry import OPS

from .gpu import agrees, large, need_kernel, on_gpu, repeats, replays

pytestmark = pytest.mark.gpu

SHAPES = [(1, 128), (7, 72), (130, 512), (33, 1536), large(515, 7168), (3, 7168)]


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize("kernel", SHARES)
def test_norm_values(kernel: str, tokens: int, width: int) -> None:
    """1/sqrt is within 2^-22 (docs/numerics.md), so that few elements round to a neighbour."""
    need_kernel(kernel)
    agrees(OPS[kernel], *arguments(kernel, tokens, width, "cpu"), share=SHARE)


@pytest.mark.parametrize("kernel", ["rms_norm", "rms_norm_residual", "rms_norm_backward"])
def test_norm_values_of_special_rows(kernel: str) -> None:
    """Zeros, NaN and Inf stay in their row; rows of huge and of tiny numbers have no overflow that the model has not."""
    given = arguments(kernel, 9, 1536, "cpu")
    x = given[1] if kernel == "rms_norm_backward" else given[0]
    for row, value in enumerate((0.0, float("nan"), float("inf"), 3e18, 1e-20)):
        x[row, :: 1 if row != 1 else 700] = value
    if kernel == "rms_norm_backward":  # what the forward pass says of these rows
        given = (*given[:3], (x.float().square().mean(-1) + 1e-6).rsqrt(), given[4])
    with deepseek_ops.backend("modelled"):
        want = OPS[kernel](*given)
    with deepseek_ops.backend("cuda"):
        got = OPS[kernel](*on_gpu(given))
    rows = [
        (g.cpu(), w) for g, w in zip(got, want, strict=True) if g.shape[0] == 9
    ]  # not the weight's gradient
    for g, w in rows:
        assert not (wrong := difference([g], [w], SHARE)), wrong


@pytest.mark.parametrize("pow2", [False, True])
def test_norm_values_are_those_of_two_ops(pow2: bool) -> None:
    """Fusing the quantiser changes no bit: on the same device the two agree exactly."""
    x, weight, eps, _ = on_gpu(arguments("rms_norm_quantize", 130, 7168, "cpu"))
    residual = torch.flip(x, (0,))
    with deepseek_ops.backend("cuda"):
        y, rstd = OPS["rms_norm"](x, weight, eps)
        alone = (*quantize.quantize_1x128(y, pow2=pow2), rstd)
        y, new_residual, rstd = OPS["rms_norm_residual"](x, residual, weight, eps)
        added = (*quantize.quantize_1x128(y, pow2=pow2), rstd, new_residual)
        assert all(map(same_bits, tensors(OPS["rms_norm_quantize"](x, weight, eps, pow2)), alone))
        got = tensors(OPS["rms_norm_residual_quantize"](x, residual, weight, eps, pow2))
        assert all(map(same_bits, got, added))


@pytest.mark.parametrize("kernel", SHARES)
def test_norm_repeat(kernel: str) -> None:
    repeats(OPS[kernel], *arguments(kernel, 1000, 1536, "cpu"))


@pytest.mark.parametrize("kernel", SHARES)
def test_norm_graph(kernel: str) -> None:
    replays(OPS[kernel], *(arguments(kernel, 130, 1536, "cpu", seed) for seed in (0, 1)))
