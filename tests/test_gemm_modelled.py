"""Backend "modelled": where the caller leaves the order of an FP8 sum to the backend, it is the tensor core's."""

import pytest
import torch

import deepseek_ops
from deepseek_ops import _registry
from deepseek_ops.gemm import fp8_gemm, fp8_gemm_grouped, fp8_gemm_masked, fp8_wgrad, fp8_wgrad_grouped
from deepseek_ops.quantize import quantize_1x128, quantize_128x1, quantize_128x128

G, ROWS, N, K = 2, 20, 24, 264


def rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).abs()


def dense():
    return fp8_gemm, (*quantize_1x128(rows(ROWS, K, 0)), *quantize_128x128(rows(N, K, 1))), (ROWS, N)


def grouped():
    weights = quantize_128x128(rows(G * N, K, 1).view(G, N, K))
    offsets = torch.tensor([0, 7, ROWS], dtype=torch.int32)
    return fp8_gemm_grouped, (*quantize_1x128(rows(ROWS, K, 0)), *weights, offsets), (ROWS, N)


def masked():
    weights = quantize_128x128(rows(G * N, K, 1).view(G, N, K))
    parts = [quantize_1x128(rows(ROWS, K, seed)) for seed in range(G)]
    a, scale = (torch.stack(items) for items in zip(*parts, strict=True))
    return fp8_gemm_masked, (a, scale, *weights, torch.tensor([3, ROWS], dtype=torch.int32)), (G, ROWS, N)


def wgrad():
    return fp8_wgrad, (*quantize_128x1(rows(K, N, 0)), *quantize_128x1(rows(K, ROWS, 1))), (N, ROWS)


def wgrad_grouped():
    offsets = torch.tensor([0, 130, K], dtype=torch.int32)
    a, scale_a, padded = quantize_128x1(rows(K, N, 0), offsets=offsets)
    b, scale_b, _ = quantize_128x1(rows(K, ROWS, 1), offsets=offsets)
    return fp8_wgrad_grouped, (a, scale_a, b, scale_b, padded), (G, N, ROWS)


@pytest.mark.parametrize("case", [dense, grouped, masked, wgrad, wgrad_grouped])
@pytest.mark.parametrize("in_place", [False, True])
def test_exact_is_hopper_where_kernels_are_modelled(case, in_place):
    op, operands, shape = case()

    def run(backend, accumulation):
        out = {"out": torch.zeros(shape)} if in_place else {"out_dtype": torch.float32}
        with deepseek_ops.backend(backend):
            return op(*operands, accumulation=accumulation, **out)

    want = run("reference", "hopper")
    assert torch.equal(run("modelled", "exact"), want)
    assert torch.equal(run("modelled", "hopper"), want)
    assert not torch.equal(run("reference", "exact"), want)  # positive data: truncation shows
    assert not torch.equal(run("modelled", "hopper_unpromoted"), want)


def test_named_arguments_and_every_fp8_op():
    _, (a, scale_a, b, scale_b), _ = dense()
    named = {"out_dtype": torch.float32, "accumulation": "exact"}
    with deepseek_ops.backend("modelled"):
        got = torch.ops.deepseek_ops.fp8_gemm(a, scale_a, b, scale_b, **named)
        assert torch.equal(got, fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32))
    for name, op in _registry.OPS.items():  # an op of the family added later must not be forgotten
        if name.startswith("fp8_") and "accumulation" in op.schema:
            assert op.kernels["modelled"] is not op.kernels["reference"], name


def test_every_backend_can_give_these_bits(backend_name):
    _, (a, scale_a, b, scale_b), _ = dense()
    got = fp8_gemm(a, scale_a, b, scale_b, accumulation="hopper")
    with deepseek_ops.backend("modelled"):
        assert torch.equal(got, fp8_gemm(a, scale_a, b, scale_b, accumulation="exact"))
