"""Contractions that TMA cannot read as the quantisers leave them: rows of K bytes at no multiple of 16."""

import pytest
import torch

import deepseek_ops
from deepseek_ops.gemm import fp8_gemm
from deepseek_ops.nn import Fp8Linear
from deepseek_ops.quantize import quantize_1x128, quantize_128x128


@pytest.mark.parametrize("k", [1, 72, 200])
def test_any_k(backend_name, k):
    generator = torch.Generator().manual_seed(k)
    a, scale_a = quantize_1x128(torch.randn(70, k, generator=generator))
    b, scale_b = quantize_128x128(torch.randn(40, k, generator=generator))
    got = fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32, accumulation="hopper")
    with deepseek_ops.backend("reference"):
        expected = fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32, accumulation="hopper")
    assert torch.equal(got, expected)


def test_linear_with_200_inputs(backend_name):
    torch.manual_seed(0)
    layer = Fp8Linear(200, 64)
    x = torch.randn(33, 200)
    with torch.no_grad():
        got = layer(x)
        with deepseek_ops.backend("reference"):
            expected = layer(x)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)  # the reference accumulates exactly
