"""Declarations of the GEMM family.

Every function is two ops: `name` returns a fresh output and `name_` writes into `out`. Only a fresh output can be
differentiated. Gradients are ops of the family again, and those have gradients too, so derivatives of any order
run on the same kernels:

    D = gemm(a, b) = a b^T      da = gemm(dD, b^T)       db = wgrad(dD, a)
    D = wgrad(a, b) = a^T b     da = gemm(b, dD)         db = gemm(a, dD^T)

and so for grouped and masked rows. A gradient is rounded to the operands' dtype before it is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch

from ._registry import declare
from .reference import gemm as reference
from .reference.modelled import bf16_gemm as modelled_bf16
from .reference.modelled import gemm as modelled

# --- e4m3 operands ---------------------------------------------------------------------------------------------


def _nothing(*args: Any) -> None:
    """In-place ops have no outputs."""


def _rows_by_columns(
    a: Any, scale_a: Any, b: Any, scale_b: Any, out_dtype: Any, accumulation: Any, *knobs: Any
) -> Any:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _grouped_by_columns(
    a: Any, sa: Any, b: Any, sb: Any, index: Any, out_dtype: Any, accumulation: Any, *knobs: Any
) -> Any:
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype)


def _groups_of_outputs(
    a: Any, sa: Any, b: Any, sb: Any, offsets: Any, out_dtype: Any, accumulation: Any, *knobs: Any
) -> Any:
    return a.new_empty((offsets.shape[0] - 1, a.shape[0], b.shape[0]), dtype=out_dtype)


# The knobs of fp8_gemm and its kin decide how a kernel does its work, never what comes out; 0: the cost model decides.
fp8_gemm = declare(
    "fp8_gemm(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, ScalarType out_dtype, str accumulation, "
    "int num_sms=0, int tile_rows=0, int tile_columns=0) -> Tensor",
    reference=reference.fp8_gemm,
    modelled=modelled.fp8_gemm,
    fake=_rows_by_columns,
)
fp8_gemm_ = declare(
    "fp8_gemm_(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor(a!) out, bool accumulate, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> ()",
    reference=reference.fp8_gemm_,
    modelled=modelled.fp8_gemm_,
    fake=_nothing,
)
fp8_gemm_grouped = declare(
    "fp8_gemm_grouped(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor offsets, ScalarType out_dtype, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> Tensor",
    reference=reference.fp8_gemm_grouped,
    modelled=modelled.fp8_gemm_grouped,
    fake=_grouped_by_columns,
)
fp8_gemm_grouped_ = declare(
    "fp8_gemm_grouped_(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor offsets, Tensor(a!) out, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> ()",
    reference=reference.fp8_gemm_grouped_,
    modelled=modelled.fp8_gemm_grouped_,
    fake=_nothing,
)
fp8_gemm_masked = declare(
    "fp8_gemm_masked(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor masked_m, ScalarType out_dtype, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> Tensor",
    reference=reference.fp8_gemm_masked,
    modelled=modelled.fp8_gemm_masked,
    fake=_grouped_by_columns,
)
fp8_gemm_masked_ = declare(
    "fp8_gemm_masked_(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor masked_m, Tensor(a!) out, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> ()",
    reference=reference.fp8_gemm_masked_,
    modelled=modelled.fp8_gemm_masked_,
    fake=_nothing,
)
fp8_wgrad = declare(
    "fp8_wgrad(Tensor a_t, Tensor scale_a, Tensor b_t, Tensor scale_b, ScalarType out_dtype, str accumulation, "
    "int num_sms=0, int tile_rows=0, int tile_columns=0) -> Tensor",
    reference=reference.fp8_wgrad,
    modelled=modelled.fp8_wgrad,
    fake=_rows_by_columns,
)
fp8_wgrad_ = declare(
    "fp8_wgrad_(Tensor a_t, Tensor scale_a, Tensor b_t, Tensor scale_b, Tensor(a!) out, bool accumulate, "
    "str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> ()",
    reference=reference.fp8_wgrad_,
    modelled=modelled.fp8_wgrad_,
    fake=_nothing,
)
fp8_wgrad_grouped = declare(
    "fp8_wgrad_grouped(Tensor a_t, Tensor scale_a, Tensor b_t, Tensor scale_b, Tensor offsets, "
    "ScalarType out_dtype, str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> Tensor",
    reference=reference.fp8_wgrad_grouped,
    modelled=modelled.fp8_wgrad_grouped,
    fake=_groups_of_outputs,
)
fp8_wgrad_grouped_ = declare(
    "fp8_wgrad_grouped_(Tensor a_t, Tensor scale_a, Tensor b_t, Tensor scale_b, Tensor offsets, Tensor(a!) out, "
    "bool accumulate, str accumulation, int num_sms=0, int tile_rows=0, int tile_columns=0) -> ()",
    reference=reference.fp8_wgrad_grouped_,
    modelled=modelled.fp8_wgrad_grouped_,
    fake=_nothing,
)

# --- bf16, fp32 and fp64 operands ------------------------------------------------------------------------------


# As those of fp8_gemm; only kernels, which take bf16, look at them.
_KNOBS = ", int num_sms=0, int tile_rows=0, int tile_columns=0"


def _gradients(ctx: Any, da: torch.Tensor | None, db: torch.Tensor | None) -> tuple[Any, ...]:
    """Of a and b, and nothing for the other arguments of the call, however many it gave."""
    return da, db, *(None for _ in ctx.needs_input_grad[2:])


def _save_dense(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _save_indexed(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gemm_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm(d_out, b.mT, a.dtype) if ctx.needs_input_grad[0] else None
    db = wgrad(d_out, a, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


def _gemm_grouped_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b, offsets = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm_grouped(d_out, b.mT, offsets, a.dtype) if ctx.needs_input_grad[0] else None
    db = wgrad_grouped(d_out, a, offsets, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


def _gemm_masked_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b, masked_m = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm_masked(d_out, b.mT, masked_m, a.dtype) if ctx.needs_input_grad[0] else None
    db = wgrad_masked(d_out, a, masked_m, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


def _wgrad_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm(b, d_out, a.dtype) if ctx.needs_input_grad[0] else None
    db = gemm(a, d_out.mT, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


def _wgrad_grouped_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b, offsets = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm_grouped(b, d_out, offsets, a.dtype) if ctx.needs_input_grad[0] else None
    db = gemm_grouped(a, d_out.mT, offsets, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


def _wgrad_masked_backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
    a, b, masked_m = ctx.saved_tensors
    d_out = d_out.to(a.dtype)
    da = gemm_masked(b, d_out, masked_m, a.dtype) if ctx.needs_input_grad[0] else None
    db = gemm_masked(a, d_out.mT, masked_m, b.dtype) if ctx.needs_input_grad[1] else None
    return _gradients(ctx, da, db)


gemm = declare(
    "gemm(Tensor a, Tensor b, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.gemm,
    modelled=modelled_bf16.gemm,
    fake=lambda a, b, out_dtype, *knobs: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
    save=_save_dense,
    backward=_gemm_backward,
)
gemm_ = declare(
    "gemm_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate" + _KNOBS + ") -> ()",
    reference=reference.gemm_,
    modelled=modelled_bf16.gemm_,
    fake=_nothing,
)
gemm_grouped = declare(
    "gemm_grouped(Tensor a, Tensor b, Tensor offsets, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.gemm_grouped,
    modelled=modelled_bf16.gemm_grouped,
    fake=lambda a, b, offsets, out_dtype, *knobs: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
    save=_save_indexed,
    backward=_gemm_grouped_backward,
)
gemm_grouped_ = declare(
    "gemm_grouped_(Tensor a, Tensor b, Tensor offsets, Tensor(a!) out" + _KNOBS + ") -> ()",
    reference=reference.gemm_grouped_,
    modelled=modelled_bf16.gemm_grouped_,
    fake=_nothing,
)
gemm_masked = declare(
    "gemm_masked(Tensor a, Tensor b, Tensor masked_m, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.gemm_masked,
    modelled=modelled_bf16.gemm_masked,
    fake=lambda a, b, masked_m, out_dtype, *knobs: a.new_empty((*a.shape[:2], b.shape[1]), dtype=out_dtype),
    save=_save_indexed,
    backward=_gemm_masked_backward,
)
gemm_masked_ = declare(
    "gemm_masked_(Tensor a, Tensor b, Tensor masked_m, Tensor(a!) out" + _KNOBS + ") -> ()",
    reference=reference.gemm_masked_,
    modelled=modelled_bf16.gemm_masked_,
    fake=_nothing,
)
wgrad = declare(
    "wgrad(Tensor a, Tensor b, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.wgrad,
    modelled=modelled_bf16.wgrad,
    fake=lambda a, b, out_dtype, *knobs: a.new_empty((a.shape[1], b.shape[1]), dtype=out_dtype),
    save=_save_dense,
    backward=_wgrad_backward,
)
wgrad_ = declare(
    "wgrad_(Tensor a, Tensor b, Tensor(a!) out, bool accumulate" + _KNOBS + ") -> ()",
    reference=reference.wgrad_,
    modelled=modelled_bf16.wgrad_,
    fake=_nothing,
)
wgrad_grouped = declare(
    "wgrad_grouped(Tensor a, Tensor b, Tensor offsets, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.wgrad_grouped,
    modelled=modelled_bf16.wgrad_grouped,
    fake=lambda a, b, offsets, out_dtype, *knobs: a.new_empty(
        (offsets.shape[0] - 1, a.shape[1], b.shape[1]), dtype=out_dtype
    ),
    save=_save_indexed,
    backward=_wgrad_grouped_backward,
)
wgrad_grouped_ = declare(
    "wgrad_grouped_(Tensor a, Tensor b, Tensor offsets, Tensor(a!) out, bool accumulate" + _KNOBS + ") -> ()",
    reference=reference.wgrad_grouped_,
    modelled=modelled_bf16.wgrad_grouped_,
    fake=_nothing,
)
# Only the gradient of gemm_masked needs it, so it has no public function and no in-place form.
wgrad_masked = declare(
    "wgrad_masked(Tensor a, Tensor b, Tensor masked_m, ScalarType out_dtype" + _KNOBS + ") -> Tensor",
    reference=reference.wgrad_masked,
    modelled=modelled_bf16.wgrad_masked,
    fake=lambda a, b, masked_m, out_dtype, *knobs: a.new_empty(
        (a.shape[0], a.shape[2], b.shape[2]), dtype=out_dtype
    ),
    save=_save_indexed,
    backward=_wgrad_masked_backward,
)
