"""fp8_gemm on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from bench.proof.vendor import exact_product
from deepseek_ops import gemm

from .gpu import agrees, large, need_kernel, repeats, replays
from .gpu import fp8_operands as operands

pytestmark = pytest.mark.gpu


GEMMS = [(1, 8, 128), (64, 128, 512), (129, 136, 144), large(128, 576, 1536), large(257, 2112, 7168)]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), GEMMS)
def test_fp8_gemm_bits(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    """Equal to the model of the tensor core, bit for bit."""
    need_kernel("fp8_gemm")
    agrees(gemm.fp8_gemm, *operands(m, n, k), out_dtype=out_dtype, accumulation="hopper")


@pytest.mark.parametrize("k", [512, large(4096), large(16384)])
def test_fp8_gemm_accuracy_on_positive_data(k: int) -> None:
    """A kernel without promotion loses 0.6 % to 25 % here."""
    need_kernel("fp8_gemm")
    a, scale_a, b, scale_b = (t.cuda() for t in operands(128, 128, k, positive=True))
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32).double()
    exact = exact_product(a, scale_a, b, scale_b)
    assert abs(float((got - exact).mean() / exact.mean())) <= 1e-3


def test_fp8_gemm_repeat() -> None:
    repeats(gemm.fp8_gemm, *operands(515, 1152, 2048), out_dtype=torch.float32)


def test_fp8_gemm_graph() -> None:
    """Replayed on other data, into the output of the capture."""
    replays(gemm.fp8_gemm, *(operands(256, 512, 1024, positive) for positive in (False, True)))
