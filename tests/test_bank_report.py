"""The bank report of the real kernels: what their READMEs say about shared memory is what a checked run counts."""

import pytest
import torch

import deepseek_ops
from deepseek_ops import _registry, gemm, quantize

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def counted():
    reason = _registry.absent_reason("checked")
    if reason:
        pytest.skip(f"backend checked: {reason}")
    torch.manual_seed(0)
    with deepseek_ops.backend("checked"), deepseek_ops.emulation(banks=True):
        yield


@pytest.mark.parametrize(
    ("tile", "dtype"), [((128, 160), BF16), ((64, 256), BF16), ((256, 128), FP32)], ids=str
)
def test_fp8_gemm_has_no_conflicts(tile, dtype):
    a = quantize.quantize_1x128(torch.randn(200, 264, dtype=BF16))
    b = quantize.quantize_128x128(torch.randn(304, 264, dtype=BF16))
    gemm.fp8_gemm(*a, *b, out_dtype=dtype, tile=tile)
    sites = deepseek_ops.bank_sites()
    assert {site.what for site in sites} == {"read of 4 B"} | ({"stmatrix"} if dtype == BF16 else set())
    assert all(site.requests > 0 and site.conflicts == 0 for site in sites), deepseek_ops.bank_report()
    assert deepseek_ops.last_statistics().bank_conflicts == 0


def test_transposing_quantiser_has_the_conflicts_of_its_readme():
    quantize.quantize_128x1(torch.randn(200, 520, dtype=BF16))
    sites = deepseek_ops.bank_sites()
    conflicts = {f"{site.site.split(':')[0]} {site.what}": site.conflicts / site.requests for site in sites}
    assert conflicts["column_output.cuh write of 4 B"] == 0  # into the transposed tile
    assert conflicts["column_output.cuh read of 16 B"] == 0  # and out of it
    assert conflicts["column_output.cuh write of 16 B"] == 4  # maxima
    assert any(
        site.what == "read of 4 B" and site.conflicts == site.requests for site in sites
    )  # multipliers
    assert sum(site.conflicts for site in sites) == deepseek_ops.last_statistics().bank_conflicts
    assert deepseek_ops.bank_report().splitlines()[0].split() == [
        "place", "what", "requests", "wavefronts", "conflicts", "worst",
    ]  # fmt: skip
