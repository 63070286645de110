"""bf16 GEMM on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

from deepseek_ops._registry import OPS
from deepseek_ops.gemm import gemm, gemm_grouped, gemm_masked, wgrad, wgrad_grouped

from .gpu import agrees, draw, i32, large, need_kernel, repeats, replays

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 128), (65, 128, 512), (129, 136, 144), large(257, 256, 7168)]
)
def test_bf16_gemm_bits(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    need_kernel("gemm")
    a, b = draw(m, k), draw(n, k)
    for x in (a, a.T.contiguous().T):
        for y in (b, b.T.contiguous().T):
            agrees(gemm, x, y, out_dtype=out_dtype)
    agrees(wgrad, a.T.contiguous(), b.T.contiguous(), out_dtype=out_dtype)


@pytest.mark.parametrize("bounds", [[0, 0, 130, 131, 300], [3, 64, 64, 191, 290]])
def test_bf16_gemm_bits_of_groups(bounds: list[int]) -> None:
    offsets, counts = i32(bounds), i32([0, 75, 1, 64])
    x, y, w = draw(300, 136), draw(300, 264), draw(4, 200, 136)
    for t in (x, y):
        t[: bounds[0]], t[bounds[-1] :] = float("nan"), float("nan")
    agrees(gemm_grouped, x, w, offsets)
    agrees(wgrad_grouped, x, y, offsets, out_dtype=torch.float32)
    agrees(gemm_masked, x.view(4, 75, 136), w, counts)


def test_bf16_gemm_bits_of_the_masked_gradient() -> None:
    """It has no public function: only the gradient of gemm_masked needs it."""
    need_kernel("wgrad_masked")
    agrees(OPS["wgrad_masked"], draw(4, 75, 136), draw(4, 75, 200), i32([0, 75, 1, 64]), torch.float32)


def test_bf16_gemm_repeat() -> None:
    repeats(wgrad_grouped, draw(3000, 1032), draw(3000, 520), i32([0, 7, 1500, 2999]))


def test_bf16_gemm_graph() -> None:
    """Replayed with other offsets on the device."""
    given = draw(512, 256), draw(3, 512, 256)
    replays(gemm_grouped, *((*given, i32(bounds)) for bounds in ([0, 100, 300, 512], [0, 0, 511, 512])))
