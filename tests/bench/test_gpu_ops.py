"""Kernels on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/claims.py finds its evidence by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import deepseek_ops
from bench import memory_bound
from bench.proof.benchmarks import QUANTISERS, same_bits
from deepseek_ops import gemm, quantize
from deepseek_ops._registry import OPS, absent_reason

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda_backend() -> Iterator[None]:
    reason = absent_reason("cuda")
    if reason:
        pytest.skip(f"backend cuda: {reason}")
    yield


def need_kernel(op: str) -> None:
    """A module that lost a kernel is a failure, not a skip."""
    assert "cuda" in OPS[op].kernels, f"{op} has no cuda kernel"


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


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("kernel", QUANTISERS)
def test_quantiser_bytes(kernel: str, tokens: int, hidden: int, pow2: bool) -> None:
    """Bytes and scales equal the reference's on the CPU."""
    need_kernel(kernel)
    function: Callable = getattr(quantize, kernel)
    x = special(tokens, hidden)
    with deepseek_ops.backend("reference"):
        want = function(x, pow2=pow2)
    with deepseek_ops.backend("cuda"):
        got = function(x.cuda(), pow2=pow2)
    for g, w in zip(got, want, strict=True):
        assert same_bits(g.cpu(), w)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (129, 512), (300, 2048), (70, 7168), (9, 18432)])
@pytest.mark.parametrize("kernel", memory_bound.KERNELS, ids=lambda kernel: kernel.name)
def test_memory_bound_values(kernel: memory_bound.Kernel, rows: int, columns: int) -> None:
    """Equal to the modelled bits but for the last places of approximate instructions."""
    call = kernel.make(rows, columns)
    with deepseek_ops.backend("modelled"):
        want = call()
    with deepseek_ops.backend("cuda"):
        got, again = call(), call()
    assert memory_bound.agrees(got, want) == ""
    pairs = zip(memory_bound.tensors(got), memory_bound.tensors(again), strict=True)
    assert all(same_bits(a, b) for a, b in pairs), "two runs differ"


def operands(m: int, n: int, k: int, positive: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * k)
    draw = torch.rand if positive else torch.randn
    x, w = (draw(rows, k, generator=generator).to(torch.bfloat16) for rows in (m, n))
    with deepseek_ops.backend("reference"):
        return (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))


GEMMS = [(1, 8, 128), (64, 128, 512), (129, 136, 144), (128, 576, 1536), (257, 2112, 7168)]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), GEMMS)
def test_fp8_gemm_bits(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    """Equal to the model of the tensor core, bit for bit."""
    need_kernel("fp8_gemm")
    given = operands(m, n, k)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_gemm(*given, out_dtype=out_dtype, accumulation="hopper")
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_gemm(*[t.cuda() for t in given], out_dtype=out_dtype, accumulation="hopper")
    assert same_bits(got.cpu(), want)


@pytest.mark.parametrize("k", [512, 4096, 16384])
def test_fp8_gemm_accuracy_on_positive_data(k: int) -> None:
    """A kernel without promotion loses 0.6 % to 25 % here."""
    need_kernel("fp8_gemm")
    a, scale_a, b, scale_b = (t.cuda() for t in operands(128, 128, k, positive=True))
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32).double()
    left = a.double() * scale_a.double().T.repeat_interleave(128, 1)
    right = b.double() * scale_b.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = left @ right.T
    assert abs(float((got - exact).mean() / exact.mean())) <= 1e-3


def test_fp8_gemm_repeat() -> None:
    """Twenty runs, one answer."""
    need_kernel("fp8_gemm")
    given = [t.cuda() for t in operands(515, 1152, 2048)]
    with deepseek_ops.backend("cuda"):
        first = gemm.fp8_gemm(*given, out_dtype=torch.float32)
        assert all(same_bits(gemm.fp8_gemm(*given, out_dtype=torch.float32), first) for _ in range(20))


def test_fp8_gemm_graph() -> None:
    """Captured once, replayed on new data, on a stream that is not the default one."""
    need_kernel("fp8_gemm")
    first, second = ([t.cuda() for t in operands(256, 512, 1024, positive)] for positive in (False, True))
    static = [t.clone() for t in first]
    out = torch.empty(256, 512, device="cuda", dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_gemm(*static, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm.fp8_gemm(*static, out=out)
        for given in (first, second):
            for to, value in zip(static, given, strict=True):
                to.copy_(value)
            graph.replay()
            assert same_bits(out, gemm.fp8_gemm(*given))
