"""FP8 products with few rows in the kernel's own steps: ranges of K, each promoted per slice, added in ascending order."""

from __future__ import annotations

import torch

from .. import gemm
from ..quantize import rows_of_blocks
from ..tensor_core import SLICE, matmul_promoted


def fp8_gemm_decode(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    split_k: int,
    num_sms: int = 0,
    prefetch_weights: bool = False,
) -> torch.Tensor:
    """fp32 sums of `split_k` ranges, added in fp32 from the first to the last, rounded once."""
    rows, columns = scale_a[:, : a.shape[0]], rows_of_blocks(scale_b, b.shape[0]).mT
    slices = rows.shape[0]
    total: torch.Tensor | None = None
    for r in range(split_k):
        first, past = r * slices // split_k, (r + 1) * slices // split_k
        k = slice(first * SLICE, past * SLICE)
        part = matmul_promoted(a[:, k], rows[first:past], b[:, k], columns[first:past])
        total = part if total is None else total + part
    assert total is not None
    return total.to(out_dtype)


def fp8_gemm_decode_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    split_k: int,
    num_sms: int = 0,
    prefetch_weights: bool = False,
) -> None:
    out.copy_(fp8_gemm_decode(a, scale_a, b, scale_b, out.dtype, split_k))


def fp8_gemm_masked_decode(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out_dtype: torch.dtype,
    num_sms: int = 0,
) -> torch.Tensor:
    """A batch is not split."""
    return gemm.fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out_dtype, "hopper")


def fp8_gemm_masked_decode_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out: torch.Tensor,
    num_sms: int = 0,
) -> None:
    gemm.fp8_gemm_masked_(a, scale_a, b, scale_b, masked_m, out, "hopper")
