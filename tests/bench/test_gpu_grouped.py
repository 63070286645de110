"""The grouped FP8 GEMMs on silicon: run by `python -m bench.prove`, never in CI. bench/proof/claims.py finds its evidence
by the names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import deepseek_ops
from bench.proof.benchmarks import same_bits
from deepseek_ops import gemm, quantize
from deepseek_ops._registry import OPS, absent_reason

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda_backend() -> Iterator[None]:
    reason = absent_reason("cuda")
    if reason:
        pytest.skip(f"backend cuda: {reason}")
    assert {"fp8_gemm_grouped", "fp8_gemm_grouped_", "fp8_gemm_masked", "fp8_gemm_masked_"} <= {
        name for name, op in OPS.items() if "cuda" in op.kernels
    }
    yield


def operands(groups: int, rows: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(groups + 2 * rows + 3 * n + 5 * k)
    x, w = (torch.randn(*shape, k, generator=generator).bfloat16() for shape in ((rows,), (groups, n)))
    with deepseek_ops.backend("reference"):
        return (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))


def i32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


GROUPS = {
    "uniform": ([128] * 4, 0, 0),
    "odd_tiles": ([192, 3, 129], 0, 0),
    "empty": ([0] * 8, 3, 4),
    "one_row_each": ([1] * 32, 0, 0),
    "zipf": ([300, 0, 150, 1, 100, 0, 75, 0], 5, 70),
    "257": ([3 if g % 50 == 7 else 0 for g in range(257)], 2, 2),
}


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(576, 528), (264, 2048)])
@pytest.mark.parametrize("name", GROUPS)
def test_fp8_gemm_grouped_bits(name: str, n: int, k: int, out_dtype: torch.dtype) -> None:
    """Every tile gives the bits of the tensor-core model; rows of no group are zero, and left alone in `out`."""
    sizes, before, after = GROUPS[name]
    bounds = list(itertools.accumulate(sizes, initial=before))
    given = (*operands(len(sizes), bounds[-1] + after, n, k), i32(bounds))
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_grouped(*given, out_dtype=out_dtype)
    given = tuple(t.cuda() for t in given)
    with deepseek_ops.backend("cuda"):
        for tile in (None, *deepseek_ops._gemm_checks.FP8_GROUPED_TILES):
            got = gemm.fp8_gemm_grouped(*given, out_dtype=out_dtype, tile=tile)
            assert same_bits(got.cpu(), want)
            out = torch.full_like(got, 777.0)
            gemm.fp8_gemm_grouped(*given, out=out, tile=tile)
            assert same_bits(out[before : bounds[-1]].cpu(), want[before : bounds[-1]])
            assert (out[:before] == 777.0).all() and (out[bounds[-1] :] == 777.0).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 20, 7, 20], [0] * 6, [g % 5 for g in range(40)], [64, 130, 129]])
def test_fp8_gemm_masked_bits(counts: list[int], out_dtype: torch.dtype) -> None:
    groups, room, n, k = len(counts), max(counts) + 3, 264, 528
    a, scale_a, b, scale_b = operands(groups, groups * room, n, k)
    scales = torch.ones(groups, scale_a.shape[0], -(-room // 4) * 4)
    scales[..., :room] = scale_a[:, : groups * room].reshape(-1, groups, room).transpose(0, 1)
    given = (a.view(groups, room, k), scales, b, scale_b, i32(counts))
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_masked(*given, out_dtype=out_dtype)
    there = torch.arange(room)[None, :] < i32(counts)[:, None]
    given = tuple(t.cuda() for t in given)
    with deepseek_ops.backend("cuda"):
        for tile in (None, *deepseek_ops._gemm_checks.FP8_GROUPED_TILES):
            assert same_bits(gemm.fp8_gemm_masked(*given, out_dtype=out_dtype, tile=tile).cpu(), want)
            out = torch.full_like(want, 777.0).cuda()
            gemm.fp8_gemm_masked(*given, out=out, tile=tile)
            assert same_bits(out.cpu()[there], want[there]) and (out.cpu()[~there] == 777.0).all()


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
        device = tuple(t.cuda() for t in given)
        with deepseek_ops.backend("cuda"):
            assert same_bits(gemm.fp8_gemm_grouped(*device, i32(bad).cuda()).cpu(), want)
            gemm.fp8_gemm_grouped(*device, i32(bad).cuda(), out=frame[2:702, 8:272])
        rows = slice(2 + meant[0], 2 + meant[-1])
        assert same_bits(frame[rows, 8:272].cpu(), want[meant[0] : meant[-1]])
        frame[rows, 8:272] = 777.0
        assert (frame == 777.0).all()


def test_fp8_gemm_grouped_repeat() -> None:
    """Twenty runs, one answer."""
    given = [
        t.cuda() for t in (*operands(8, 1000, 1152, 2048), i32([0, 300, 300, 301, 500, 700, 703, 900, 1000]))
    ]
    with deepseek_ops.backend("cuda"):
        first = gemm.fp8_gemm_grouped(*given, out_dtype=torch.float32)
        assert all(
            same_bits(gemm.fp8_gemm_grouped(*given, out_dtype=torch.float32), first) for _ in range(20)
        )


def test_fp8_gemm_grouped_graph() -> None:
    """Captured once; replayed with other offsets in the same tensor, chained so that programmatic launches overlap."""
    given = [t.cuda() for t in operands(4, 512, 512, 1024)]
    offsets = i32([0, 128, 256, 384, 512]).cuda()
    out = torch.empty(512, 512, device="cuda", dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_gemm_grouped(*given, offsets, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(3):
                gemm.fp8_gemm_grouped(*given, offsets, out=out)
        for bounds in ([0, 128, 256, 384, 512], [0, 0, 5, 500, 512], [0, 512, 512, 512, 512]):
            offsets.copy_(i32(bounds))
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(out, gemm.fp8_gemm_grouped(*given, offsets))
