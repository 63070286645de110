"""FP8 weight gradients on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import deepseek_ops
from bench.proof.rows import same_bits
from deepseek_ops import gemm, quantize
from deepseek_ops._gemm_checks import FP8_WGRAD_TILES

from .gpu import i32, large, need_kernel, repeats, replays

pytestmark = pytest.mark.gpu


def wgrad_operands(m: int, n: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * tokens + seed)
    with deepseek_ops.backend("reference"):
        pieces = [quantize.quantize_1x128(torch.randn(rows, tokens, generator=generator)) for rows in (m, n)]
    return [t for piece in pieces for t in piece]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "tokens"), [(1, 8, 128), (64, 128, 512), (129, 136, 144), large(257, 1408, 2048)]
)
def test_fp8_wgrad_bits(m: int, n: int, tokens: int, out_dtype: torch.dtype) -> None:
    """Equal to the model of the tensor core, bit for bit, overwriting and accumulating, with every tile."""
    need_kernel("fp8_wgrad")
    given = wgrad_operands(m, n, tokens)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_wgrad(*given, accumulation="hopper")
    old = torch.randn(m, n).to(out_dtype)
    for tile in (None, *FP8_WGRAD_TILES):
        out = old.cuda()
        with deepseek_ops.backend("cuda"):
            got = gemm.fp8_wgrad(*[t.cuda() for t in given], out_dtype=out_dtype, tile=tile)
            gemm.fp8_wgrad(*[t.cuda() for t in given], out=out, accumulate=True, tile=tile)
        assert same_bits(got.cpu(), want.to(out_dtype))
        assert same_bits(out.cpu(), (old.float() + want).to(out_dtype))


WGRAD_GROUPS = {
    "experts_of_128": [128] * 8,
    "odd_tiles": [128, 256],
    "one_hot": [0, 0, 1024, 0],
    "all_empty": [0, 0, 0],
    "ragged": [0, 640, 128, 0, 0, 384, 128, 0],
}


@pytest.mark.parametrize("sizes", WGRAD_GROUPS.values(), ids=WGRAD_GROUPS.keys())
def test_fp8_wgrad_grouped_bits(sizes: list[int]) -> None:
    """Every group bit for bit; what groups without tokens own stays as it was."""
    need_kernel("fp8_wgrad_grouped")
    bounds = [0, *itertools.accumulate(sizes)]
    given = wgrad_operands(192, 328, bounds[-1] + 128)
    offsets = i32(bounds)
    old = torch.randn(len(sizes), 192, 328)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_wgrad_grouped(*given, offsets, accumulation="hopper")
        added = old.clone()
        gemm.fp8_wgrad_grouped(*given, offsets, out=added, accumulate=True, accumulation="hopper")
    out = old.cuda()
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_wgrad_grouped(*[t.cuda() for t in (*given, offsets)])
        gemm.fp8_wgrad_grouped(*[t.cuda() for t in (*given, offsets)], out=out, accumulate=True)
    assert same_bits(got.cpu(), want) and same_bits(out.cpu(), added)


def test_fp8_wgrad_repeat() -> None:
    repeats(gemm.fp8_wgrad, *wgrad_operands(1408, 1408, 2048))


def test_fp8_wgrad_grouped_repeat() -> None:
    """Experts of 128 tokens, on which others raced (DeepGEMM 365)."""
    repeats(gemm.fp8_wgrad_grouped, *wgrad_operands(1408, 1408, 2048), i32(range(0, 2049, 128)))


def test_fp8_wgrad_graph() -> None:
    """Replayed on other operands."""
    need_kernel("fp8_wgrad")
    replays(gemm.fp8_wgrad, *(wgrad_operands(256, 384, 1024, seed) for seed in (0, 1)))


def test_fp8_wgrad_grouped_graph() -> None:
    """Replayed with other offsets: nothing of them is read on the host."""
    need_kernel("fp8_wgrad_grouped")
    given = wgrad_operands(256, 384, 1024)
    many = ([0, 128, 1024, 1024], [0, 0, 512, 640])
    replays(gemm.fp8_wgrad_grouped, *((*given, i32(offsets)) for offsets in many))
