"""Products of few rows on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from bench.proof.rows import same_bits
from deepseek_ops import gemm, quantize

from .gpu import fp8_operands as operands
from .gpu import i32, large, need_kernel, repeats, replays

pytestmark = pytest.mark.gpu


DECODES = [(1, 8, 128), (7, 136, 1536), large(16, 2112, 7168), (33, 576, 144), large(64, 4096, 2048)]


@pytest.mark.parametrize("split_k", [None, 1, 2, 4, 8])
@pytest.mark.parametrize(("m", "n", "k"), DECODES)
def test_fp8_gemm_decode_bits(m: int, n: int, k: int, split_k: int | None) -> None:
    """Equal to the model of the tensor core with the same ranges of K, with and without early weights."""
    need_kernel("fp8_gemm_decode")
    given = operands(m, n, k)
    for out_dtype in (torch.float32, torch.bfloat16):
        with deepseek_ops.backend("modelled"):
            want = gemm.fp8_gemm_decode(*given, out_dtype=out_dtype, split_k=split_k)
        on_device = [t.cuda() for t in given]
        torch.cuda.synchronize()  # the weights are there: they may be loaded early
        for prefetch in (False, True):
            with deepseek_ops.backend("cuda"):
                got = gemm.fp8_gemm_decode(
                    *on_device, out_dtype=out_dtype, split_k=split_k, prefetch_weights=prefetch
                )
            assert same_bits(got.cpu(), want)


def test_fp8_gemm_decode_batch() -> None:
    """Rows alone, in small and in large batches: one answer."""
    need_kernel("fp8_gemm_decode")
    a, scale_a, b, scale_b = (t.cuda() for t in operands(64, 512, 2048))
    with deepseek_ops.backend("cuda"):
        whole = gemm.fp8_gemm_decode(a, scale_a, b, scale_b, out_dtype=torch.float32)
        for first, past in ((0, 4), (8, 16), (32, 64), (60, 64)):
            part = gemm.fp8_gemm_decode(
                a[first:past], scale_a[:, first:past].contiguous(), b, scale_b, out_dtype=torch.float32
            )
            assert same_bits(part, whole[first:past])


def batch(groups: int, room: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(groups + room + n + k)
    with deepseek_ops.backend("reference"):
        rows = [quantize.quantize_1x128(torch.randn(room, k, generator=generator)) for _ in range(groups)]
        return (
            *(torch.stack(x) for x in zip(*rows, strict=True)),
            *quantize.quantize_128x128(torch.randn(groups, n, k, generator=generator)),
        )


@pytest.mark.parametrize(
    ("counts", "room"), [([0, 9, 0, 64], 64), ([1] * 8, 8), ([0, 0], 16), ([3, 0, 32, 17], 32)]
)
def test_fp8_gemm_masked_decode_bits(counts: list[int], room: int) -> None:
    """Empty groups among others; rows past the counts are zero, or stay in `out`."""
    need_kernel("fp8_gemm_masked_decode")
    given = (*batch(len(counts), room, 576, 1536), i32(counts))
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_masked_decode(*given)
    out = torch.full(want.shape, 7.0, dtype=torch.bfloat16, device="cuda")
    with deepseek_ops.backend("cuda"):
        assert same_bits(gemm.fp8_gemm_masked_decode(*[t.cuda() for t in given]).cpu(), want)
        gemm.fp8_gemm_masked_decode(*[t.cuda() for t in given], out=out)
    for g, count in enumerate(counts):
        assert same_bits(out[g, :count].cpu(), want[g, :count]) and bool((out[g, count:] == 7).all())


def test_fp8_gemm_decode_repeat() -> None:
    repeats(gemm.fp8_gemm_decode, *operands(33, 1152, 2048), out_dtype=torch.float32)


def test_fp8_gemm_masked_decode_repeat() -> None:
    repeats(gemm.fp8_gemm_masked_decode, *batch(8, 16, 576, 1536), i32([16, 3, 0, 16, 1, 0, 7, 9]))


def test_fp8_gemm_decode_graph() -> None:
    """Replayed on new data: the same bits as a plain call, each time, though the weights are loaded early."""
    need_kernel("fp8_gemm_decode")
    first, second = (operands(32, 1024, 2048, positive) for positive in (False, True))
    replays(gemm.fp8_gemm_decode, first, second)


def test_fp8_gemm_masked_decode_graph() -> None:
    """The counts change between replays of one graph."""
    need_kernel("fp8_gemm_masked_decode")
    given = batch(8, 16, 576, 1536)
    many = [[16] * 8, [0, 3, 0, 16, 1, 0, 0, 9], [0] * 8]
    replays(gemm.fp8_gemm_masked_decode, *((*given, i32(counts)) for counts in many))
