"""The GEMM family with the kernels' bits: what the tensor core accumulates, whatever accuracy was asked for.

"exact" leaves the order of sums to the backend, and kernels have one order only: that of "hopper". There is no kernel of
"hopper_unpromoted"; it means here what it means in the reference.
"""

from __future__ import annotations

import torch

from .. import gemm as reference


def _of_kernels(accumulation: str) -> str:
    return "hopper" if accumulation == "exact" else accumulation


def fp8_wgrad(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return reference.fp8_wgrad(a_t, scale_a, b_t, scale_b, out_dtype, _of_kernels(accumulation))


def fp8_wgrad_(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    reference.fp8_wgrad_(a_t, scale_a, b_t, scale_b, out, accumulate, _of_kernels(accumulation))


def fp8_wgrad_grouped(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return reference.fp8_wgrad_grouped(
        a_t, scale_a, b_t, scale_b, offsets, out_dtype, _of_kernels(accumulation)
    )


def fp8_wgrad_grouped_(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    reference.fp8_wgrad_grouped_(
        a_t, scale_a, b_t, scale_b, offsets, out, accumulate, _of_kernels(accumulation)
    )
