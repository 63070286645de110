"""RMSNorm: alone, with the residual addition before it, and with FP8 quantisation after it (report 2.1, 3.2.3).

``y = x / sqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded once to x's dtype. (The transformers model
rounds to bf16 before the product with the weight: its bf16 results can differ by one unit in the last place.)

Only x and the fp32 inverse norm of each row are kept for backward, which recomputes the rest: this is the report's
recomputation of RMSNorm at the level of one op. The gradient of the weight is summed over rows in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import E4M3, ceil_div, check_range, check_tensor, fail, round_up
from ._registry import declare
from .reference import norm as reference
from .reference.modelled import norm as modelled
from .reference.norm import inner_dtype

__all__ = ["rms_norm", "rms_norm_quantize", "rms_norm_residual"]

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last axis of ``x [..., D]`` and multiply by ``weight [D]``; the result has x's dtype.

    Both are bf16, fp32 or fp64, independently (fp32 weights with bf16 activations are fine). Differentiable in both.
    Raises `ArgumentError`.
    """
    _check(x, weight, eps)
    normed: Tensor = _rms_norm(x, weight, float(eps))[0]
    return normed


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual), both in the common dtype of x and residual, ``[..., D]``.

    The sum is rounded to that dtype first and then normalised, so the pair is what the two separate operations
    give. Differentiable in x, residual and weight. Raises `ArgumentError`.
    """
    _check(x, weight, eps)
    check_tensor("residual", residual, dtype=x.dtype, shape=x.shape, device=x.device)
    normed, new_residual, _ = _rms_norm_residual(x, residual, weight, float(eps))
    return normed, new_residual


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, pow2: bool = False
) -> tuple[Tensor, ...]:
    """Normalise ``x [M, D]`` (bf16 or fp32) and quantise the result in 1 x 128 tiles for the next FP8 GEMM.

    Returns (q e4m3 [M, D], scale, rstd fp32 [M]) and, with a ``residual`` [M, D] that is added first, new_residual.
    The scale is GEMM-ready: fp32 [ceil(D / 128), round_up(M, 4)]. q and scale are, bit for bit, those of
    ``quantize_1x128(rms_norm(x, weight, eps), pow2=pow2)``: the normalised row is rounded to x's dtype in between, so
    that fusing changes no training run. Not differentiable (rstd is there for a backward of your own).
    Raises `ArgumentError`.
    """
    _check(x, weight, eps)
    check_tensor("x", x, dtype=(torch.bfloat16, torch.float32), ndim=2)
    if residual is None:
        return _rms_norm_quantize(x, weight, float(eps), pow2)
    check_tensor("residual", residual, dtype=x.dtype, shape=x.shape, device=x.device)
    return _rms_norm_residual_quantize(x, residual, weight, float(eps), pow2)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_tensor("x", x, dtype=_FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        fail("x", "must have shape [..., D], D >= 1", f"shape {tuple(x.shape)}")
    check_tensor("weight", weight, dtype=_FLOATS, shape=(x.shape[-1],), device=x.device)
    check_range("eps", eps, low=0)


# Declarations: schema, meaning, shapes, gradient.


def _fake_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=inner_dtype(x))


def _fake_quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    scale = x.new_empty((ceil_div(width, 128), round_up(rows, 4)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), scale, _fake_rstd(x)


def _save(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(inputs[0], inputs[1], outputs[1])


def _backward(ctx: Any, dy: Tensor, _rstd: Any) -> tuple[Any, ...]:
    return *_rms_norm_backward(dy, *ctx.saved_tensors, None), None


def _save_residual(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[2])
    ctx.save_for_backward(outputs[1], inputs[2], outputs[2])


def _backward_residual(ctx: Any, dy: Tensor, dresidual: Tensor, _rstd: Any) -> tuple[Any, ...]:
    dsum, dweight = _rms_norm_backward(dy, *ctx.saved_tensors, dresidual)
    return dsum, dsum, dweight, None


_rms_norm_backward = declare(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual)"
    " -> (Tensor dx, Tensor dweight)",
    reference=reference.rms_norm_backward,
    modelled=modelled.rms_norm_backward,
    fake=lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_rms_norm = declare(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    reference=reference.rms_norm,
    modelled=modelled.rms_norm,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _fake_rstd(x)),
    save=_save,
    backward=_backward,
)
_rms_norm_residual = declare(
    "rms_norm_residual(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor new_residual, Tensor rstd)",
    reference=reference.rms_norm_residual,
    modelled=modelled.rms_norm_residual,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _fake_rstd(x)),
    save=_save_residual,
    backward=_backward_residual,
)
_rms_norm_quantize = declare(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, bool pow2) -> (Tensor q, Tensor scale, Tensor rstd)",
    reference=reference.rms_norm_quantize,
    modelled=modelled.rms_norm_quantize,
    fake=lambda x, *_: _fake_quantized(x),
)
_rms_norm_residual_quantize = declare(
    "rms_norm_residual_quantize(Tensor x, Tensor residual, Tensor weight, float eps, bool pow2)"
    " -> (Tensor q, Tensor scale, Tensor rstd, Tensor new_residual)",
    reference=reference.rms_norm_residual_quantize,
    modelled=modelled.rms_norm_residual_quantize,
    fake=lambda x, *_: (*_fake_quantized(x), x.new_empty(x.shape)),
)
