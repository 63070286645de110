"""The GEMM family with the kernels' bits: what the tensor core accumulates, whatever accuracy was asked for.

"exact" leaves the order of sums to the backend, and kernels have one order only: that of "hopper". There is no kernel of
"hopper_unpromoted"; it means here what it means in the reference.
"""

from __future__ import annotations

import torch

from .. import gemm as reference


def _of_kernels(accumulation: str) -> str:
    return "hopper" if accumulation == "exact" else accumulation


def fp8_gemm(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return reference.fp8_gemm(a, scale_a, b, scale_b, out_dtype, _of_kernels(accumulation))


def fp8_gemm_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    reference.fp8_gemm_(a, scale_a, b, scale_b, out, accumulate, _of_kernels(accumulation))


def fp8_gemm_grouped(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return reference.fp8_gemm_grouped(a, scale_a, b, scale_b, offsets, out_dtype, _of_kernels(accumulation))


def fp8_gemm_grouped_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    reference.fp8_gemm_grouped_(a, scale_a, b, scale_b, offsets, out, _of_kernels(accumulation))


def fp8_gemm_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return reference.fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out_dtype, _of_kernels(accumulation))


def fp8_gemm_masked_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out: torch.Tensor,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    reference.fp8_gemm_masked_(a, scale_a, b, scale_b, masked_m, out, _of_kernels(accumulation))
