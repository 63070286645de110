"""bf16 GEMM on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/claims.py finds its evidence by them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import deepseek_ops
from bench.proof.benchmarks import same_bits
from deepseek_ops._registry import OPS, absent_reason
from deepseek_ops.gemm import gemm, gemm_grouped, gemm_masked, wgrad, wgrad_grouped

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda_backend() -> Iterator[None]:
    reason = absent_reason("cuda")
    if reason:
        pytest.skip(f"backend cuda: {reason}")
    assert "cuda" in OPS["gemm"].kernels, "gemm has no cuda kernel"
    yield


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def on_both(function, *tensors, **options) -> None:
    with deepseek_ops.backend("modelled"):
        want = function(*tensors, **options)
    with deepseek_ops.backend("cuda"):
        got = function(*(t.cuda() for t in tensors), **options)
    assert same_bits(got.cpu(), want)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 128), (65, 128, 512), (129, 136, 144), (257, 256, 7168)])
def test_bf16_gemm_bits(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    a, b = draw(m, k), draw(n, k)
    for x in (a, a.T.contiguous().T):
        for y in (b, b.T.contiguous().T):
            on_both(gemm, x, y, out_dtype=out_dtype)
    on_both(wgrad, a.T.contiguous(), b.T.contiguous(), out_dtype=out_dtype)


@pytest.mark.parametrize("bounds", [[0, 0, 130, 131, 300], [3, 64, 64, 191, 290]])
def test_bf16_gemm_bits_of_groups(bounds: list[int]) -> None:
    offsets, counts = torch.tensor(bounds).int(), torch.tensor([0, 75, 1, 64]).int()
    x, y, w = draw(300, 136), draw(300, 264), draw(4, 200, 136)
    for t in (x, y):
        t[: bounds[0]], t[bounds[-1] :] = float("nan"), float("nan")
    on_both(gemm_grouped, x, w, offsets)
    on_both(wgrad_grouped, x, y, offsets, out_dtype=torch.float32)
    on_both(gemm_masked, x.view(4, 75, 136), w, counts)


def test_bf16_gemm_repeat() -> None:
    x, y, offsets = (
        draw(3000, 1032).cuda(),
        draw(3000, 520).cuda(),
        torch.tensor([0, 7, 1500, 2999]).int().cuda(),
    )
    with deepseek_ops.backend("cuda"):
        first = wgrad_grouped(x, y, offsets)
        assert all(same_bits(wgrad_grouped(x, y, offsets), first) for _ in range(20))


def test_bf16_gemm_graph() -> None:
    """Captured once, replayed with other offsets on the device, on a stream that is not the default one."""
    x, w, out = draw(512, 256).cuda(), draw(3, 512, 256).cuda(), torch.zeros(512, 512, device="cuda")
    out = out.to(torch.bfloat16)
    offsets = torch.tensor([0, 100, 300, 512]).int().cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm_grouped(x, w, offsets, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm_grouped(x, w, offsets, out=out)
        for bounds in ([0, 100, 300, 512], [0, 0, 511, 512]):
            offsets.copy_(torch.tensor(bounds))
            graph.replay()
            assert same_bits(out, gemm_grouped(x, w, offsets))
