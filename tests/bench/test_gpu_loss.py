"""Fused linear cross entropy on silicon: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from deepseek_ops import loss

from .gpu import need_kernel, repeats, replays

pytestmark = pytest.mark.gpu


def case(tokens: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    h = (torch.randn(tokens, width, generator=generator) * 0.3).to(torch.bfloat16)
    weight = torch.randn(classes, width, generator=generator).to(torch.bfloat16)
    labels = torch.randint(0, classes, (tokens,), generator=generator)
    labels[::5] = -100
    return h, weight, labels


@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize(("tokens", "width", "classes"), [(1, 72, 300), (65, 128, 1000), (200, 256, 4099)])
def test_linear_cross_entropy_values(tokens: int, width: int, classes: int, chunk: int) -> None:
    need_kernel("linear_cross_entropy")
    given = case(tokens, width, classes)
    dloss = torch.linspace(-1, 2, tokens)
    with deepseek_ops.backend("modelled"):
        want = (
            loss._tokens.plain(*given, chunk),
            *loss._tokens_backward.plain(dloss, *given, chunk, True, True),
        )
        total = loss._sum.plain(*given, chunk, False, False)[0]
    given, dloss = tuple(x.cuda() for x in given), dloss.cuda()
    with deepseek_ops.backend("cuda"):
        got = (
            loss._tokens.plain(*given, chunk),
            *loss._tokens_backward.plain(dloss, *given, chunk, True, True),
        )
        on_gpu = loss._sum.plain(*given, chunk, False, False)[0]
    # ln and e^x of the device: docs/numerics.md; logits up to 2^5 stand in the exponents.
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=2**-19, atol=2**-18)
    torch.testing.assert_close(on_gpu.cpu(), total, rtol=2**-19, atol=2**-18 * tokens)
    for x, y in zip(got[1:], want[1:], strict=True):
        error = (x.cpu().double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)
        assert error < 1e-3  # few elements round to the other bf16 neighbour


def test_linear_cross_entropy_repeat() -> None:
    repeats(loss._sum.plain, *case(515, 512, 9000), 64, True, True)


def test_linear_cross_entropy_graph() -> None:
    replays(loss._sum.plain, *((*case(130, 256, 3000, seed), 16, True, True) for seed in (0, 1)))
