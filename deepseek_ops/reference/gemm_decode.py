"""Meaning of FP8 products with few rows: those of `fp8_gemm` and `fp8_gemm_masked`, exactly accumulated.

How K is split changes roundings only, so that here nothing is split: reference/modelled/gemm_decode.py does it.
"""

from __future__ import annotations

import torch

from . import gemm


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
    """The last three steer kernels and mean nothing here."""
    return gemm.fp8_gemm(a, scale_a, b, scale_b, out_dtype, "exact")


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
    gemm.fp8_gemm_(a, scale_a, b, scale_b, out, False, "exact")


def fp8_gemm_masked_decode(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out_dtype: torch.dtype,
    num_sms: int = 0,
) -> torch.Tensor:
    return gemm.fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out_dtype, "exact")


def fp8_gemm_masked_decode_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out: torch.Tensor,
    num_sms: int = 0,
) -> None:
    gemm.fp8_gemm_masked_(a, scale_a, b, scale_b, masked_m, out, "exact")
