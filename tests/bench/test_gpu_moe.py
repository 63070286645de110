"""The MoE layer's plumbing on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import deepseek_ops
from bench.moe import updated
from bench.proof.families.moe import OPS as KERNELS
from bench.proof.rows import same_bits, tensors
from deepseek_ops import moe, quantize
from deepseek_ops._registry import OPS

from . import gpu
from .gpu import large, need_kernel, on_gpu, repeats, replays

pytestmark = pytest.mark.gpu


def moe_arguments(kernel: str, tokens: int, hidden: int, seed: int = 0) -> tuple[tuple, ...]:
    """Arguments of one op of the MoE plumbing, on the CPU; 64 experts, 8 groups, 4 open, 6 experts a token."""
    generator = torch.Generator().manual_seed(tokens + hidden + seed)
    logits = torch.randn(tokens, 64, generator=generator)
    bias = torch.randn(64, generator=generator) * 0.01
    with deepseek_ops.backend("modelled"):
        topk_idx, weight, scores, counts = moe._route(logits, bias, 6, 8, 4, 2.5, True)
        x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        here = torch.where(topk_idx < 32, topk_idx, -1)  # half of the experts are another rank's
        y, _, source = moe._permute(x, here, 32)
        quantized = quantize.quantize_1x128(x)
    cu = torch.tensor([0, tokens // 3, tokens // 3, tokens - tokens // 7], dtype=torch.int32)
    return {
        "route": (logits, bias, 6, 8, 4, 2.5, True),
        "route_backward": (torch.randn(tokens, 6, generator=generator), logits, scores, topk_idx, 2.5, True),
        "update_bias_": (bias, counts, 0.001),
        "balance_loss": (scores, topk_idx, cu, 0.1, "unbiased"),
        "permute": (x, here, 32),
        "permute_quantized": (*quantized, here, 32),
        "unpermute": (y, source, tokens, 6, weight),
        "unpermute_backward": (x, y, source, 6, weight),
    }[kernel]


@pytest.mark.parametrize(
    ("tokens", "hidden"), [(1, 128), (7, 72), large(129, 7168), (4097, 256), large(70000, 16)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moe_results(kernel: str, tokens: int, hidden: int) -> None:
    """Permutations to the byte. Elsewhere the device's exponential and reciprocal stand between us and the model
    (docs/numerics.md: 2^-21 each), so that two scores closer than that may change places."""
    need_kernel(kernel)
    arguments = moe_arguments(kernel, tokens, hidden)
    with deepseek_ops.backend("modelled"):
        want = tensors(without_effect(kernel)(*arguments))
    with deepseek_ops.backend("cuda"):
        got = tensors(without_effect(kernel)(*on_gpu(arguments)))
    for g, w in zip(got, want, strict=True):
        if kernel in ("permute", "permute_quantized", "unpermute", "unpermute_backward", "update_bias_"):
            assert same_bits(g.cpu(), w)
        elif g.is_floating_point() and kernel != "route":
            torch.testing.assert_close(g.cpu(), w, rtol=1e-5, atol=1e-6)
    if kernel == "route":
        topk_idx, weight, scores, counts = (g.cpu() for g in got)
        torch.testing.assert_close(scores, want[2], rtol=2.0**-19, atol=0)
        same = (topk_idx == want[0]).all(1)
        assert same.double().mean() > 0.999
        torch.testing.assert_close(weight[same], want[1][same], rtol=2.0**-18, atol=0)
        assert torch.equal(counts, torch.bincount(topk_idx.flatten(), minlength=64))


def without_effect(kernel: str) -> Callable:
    """The op; of one that writes in place, its result on a copy."""
    return updated if kernel == "update_bias_" else OPS[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_moe_repeat(kernel: str) -> None:
    """Twenty runs, one answer."""
    repeats(without_effect(kernel), *moe_arguments(kernel, 5000, 512))


@pytest.mark.parametrize("kernel", KERNELS)
def test_moe_op_graph(kernel: str) -> None:
    """Captured alone, replayed on another routing."""
    replays(without_effect(kernel), *(moe_arguments(kernel, 300, 512, seed) for seed in (0, 1)))


def test_moe_graph() -> None:
    """Route, there and back, captured once and replayed on other logits."""
    need_kernel("permute")
    first, second = (torch.randn(300, 64, device="cuda") for _ in range(2))
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    logits, bias = first.clone(), torch.zeros(64, device="cuda")

    def layer() -> torch.Tensor:
        topk_idx, weight, _, counts = moe.route(logits, bias, top_k=6, num_groups=8, top_groups=4)
        x_perm, _, source = moe.permute(x, topk_idx, 64)
        moe.update_bias_(bias, counts, speed=0.0)
        return moe.unpermute(x_perm, source, 300, 6, weight)

    with deepseek_ops.backend("cuda"):
        captured = gpu.Captured(layer)
        for given in (first, second):
            logits.copy_(given)
            (out,) = captured.replay()
            assert same_bits(out, layer())
