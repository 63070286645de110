"""The grouped FP8 GEMMs on silicon: run by `python -m bench.prove`, never in CI. bench/proof/families finds its evidence
by the names."""

from __future__ import annotations

import itertools

import pytest
import torch

import deepseek_ops
from bench.proof.rows import same_bits
from deepseek_ops import gemm, quantize
from deepseek_ops._gemm_checks import FP8_GROUPED_TILES

from .gpu import i32, large, need_kernel, on_gpu, repeats, replays, size

pytestmark = pytest.mark.gpu


def operands(groups: int, rows: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(groups + 2 * rows + 3 * n + 5 * k)
    x, w = (torch.randn(*shape, k, generator=generator).bfloat16() for shape in ((rows,), (groups, n)))
    with deepseek_ops.backend("reference"):
        return (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))


def masked(counts: list[int], room: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """A batch with room for `room` rows in each group."""
    groups = len(counts)
    a, scale_a, b, scale_b = operands(groups, groups * room, n, k)
    scales = torch.ones(groups, scale_a.shape[0], -(-room // 4) * 4)
    scales[..., :room] = scale_a[:, : groups * room].reshape(-1, groups, room).transpose(0, 1)
    return a.view(groups, room, k), scales, b, scale_b, i32(counts)


GROUPS = {
    "uniform": ([128] * 4, 0, 0),
    "odd_tiles": ([192, 3, 129], 0, 0),
    "empty": ([0] * 8, 3, 4),
    "one_row_each": ([1] * 32, 0, 0),
    "zipf": ([300, 0, 150, 1, 100, 0, 75, 0], 5, 70),
    "257": ([3 if g % 50 == 7 else 0 for g in range(257)], 2, 2),
}


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(264, 528), large(576, 528), large(264, 2048)])
@pytest.mark.parametrize("name", GROUPS)
def test_fp8_gemm_grouped_bits(name: str, n: int, k: int, out_dtype: torch.dtype) -> None:
    """Every tile gives the bits of the tensor-core model; rows of no group are zero, and left alone in `out`."""
    need_kernel("fp8_gemm_grouped"), need_kernel("fp8_gemm_grouped_")
    sizes, before, after = GROUPS[name]
    bounds = list(itertools.accumulate(sizes, initial=before))
    given = (*operands(len(sizes), bounds[-1] + after, n, k), i32(bounds))
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_grouped(*given, out_dtype=out_dtype)
    given = on_gpu(given)
    with deepseek_ops.backend("cuda"):
        for tile in (None, *FP8_GROUPED_TILES[: size(99, 1)]):
            got = gemm.fp8_gemm_grouped(*given, out_dtype=out_dtype, tile=tile)
            assert same_bits(got.cpu(), want)
            out = torch.full_like(got, 777.0)
            gemm.fp8_gemm_grouped(*given, out=out, tile=tile)
            assert same_bits(out[before : bounds[-1]].cpu(), want[before : bounds[-1]])
            assert (out[:before] == 777.0).all() and (out[bounds[-1] :] == 777.0).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 20, 7, 20], [0] * 6, [g % 5 for g in range(40)], [64, 130, 129]])
def test_fp8_gemm_masked_bits(counts: list[int], out_dtype: torch.dtype) -> None:
    need_kernel("fp8_gemm_masked"), need_kernel("fp8_gemm_masked_")
    room = max(counts) + 3
    given = masked(counts, room, 264, 528)
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_masked(*given, out_dtype=out_dtype)
    there = torch.arange(room)[None, :] < i32(counts)[:, None]
    given = on_gpu(given)
    with deepseek_ops.backend("cuda"):
        for tile in (None, *FP8_GROUPED_TILES[: size(99, 1)]):
            assert same_bits(gemm.fp8_gemm_masked(*given, out_dtype=out_dtype, tile=tile).cpu(), want)
            out = torch.full_like(want, 777.0).cuda()
            gemm.fp8_gemm_masked(*given, out=out, tile=tile)
            assert same_bits(out.cpu()[there], want[there]) and (out.cpu()[~there] == 777.0).all()


@pytest.mark.kernel
def test_fp8_gemm_grouped_nonsense() -> None:
    """Offsets that no host can refuse are clamped and made to ascend; nothing outside of D is written."""
    given = operands(4, 700, 264, 528)
    for bad, meant in (
        ([0, 400, 200, 300, 600], [0, 400, 400, 400, 600]),
        ([-5, 100, 2**31 - 1, 500, -(2**31)], [0, 100, 700, 700, 700]),
    ):
        with deepseek_ops.backend("modelled"):
            want = gemm.fp8_gemm_grouped(*given, i32(meant))
        frame = torch.full((704, 280), 777.0, device="cuda", dtype=torch.bfloat16)
        device = on_gpu(given)
        with deepseek_ops.backend("cuda"):
            assert same_bits(gemm.fp8_gemm_grouped(*device, i32(bad).cuda()).cpu(), want)
            gemm.fp8_gemm_grouped(*device, i32(bad).cuda(), out=frame[2:702, 8:272])
        rows = slice(2 + meant[0], 2 + meant[-1])
        assert same_bits(frame[rows, 8:272].cpu(), want[meant[0] : meant[-1]])
        frame[rows, 8:272] = 777.0
        assert (frame == 777.0).all()


def test_fp8_gemm_grouped_repeat() -> None:
    bounds = [0, 300, 300, 301, 500, 700, 703, 900, 1000]
    repeats(
        gemm.fp8_gemm_grouped,
        *operands(8, 1000, size(1152), size(2048, 256)),
        i32(bounds),
        out_dtype=torch.float32,
    )


def test_fp8_gemm_masked_repeat() -> None:
    repeats(
        gemm.fp8_gemm_masked,
        *masked([0, 20, 7, 64, 130, 1], 130, size(1152), size(1024, 256)),
        out_dtype=torch.float32,
    )


def test_fp8_gemm_grouped_graph() -> None:
    """Replayed with other offsets in the same tensor, chained so that programmatic launches overlap."""
    n = size(512)
    given = operands(4, 512, n, size(1024, 256))

    def chain(*arguments: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(512, n, device=arguments[0].device, dtype=torch.bfloat16)
        for _ in range(3):
            gemm.fp8_gemm_grouped(*arguments, out=out)
        return out

    many = ([0, 128, 256, 384, 512], [0, 0, 5, 500, 512], [0, 512, 512, 512, 512])
    replays(chain, *((*given, i32(bounds)) for bounds in many))


def test_fp8_gemm_masked_graph() -> None:
    """Replayed with other counts in the same tensor."""
    *given, _ = masked([0] * 6, 40, size(512), size(1024, 256))
    replays(
        gemm.fp8_gemm_masked, *((*given, i32(counts)) for counts in ([40] * 6, [0, 3, 40, 0, 1, 9], [0] * 6))
    )
