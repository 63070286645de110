"""Attention and the Linear behind it, with one E5M6 copy of what lies between them (report 3.3.3).

Attention's output is needed twice in backward: by attention itself (the row sums of dO * O) and by Wgrad of the Linear. The
report keeps it once, in E5M6 with power-of-two scales: 1.5 bytes per value instead of 2 + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import require
from ..attention import mla_attention, mla_attention_backward
from ..gemm import fp8_gemm
from ..quantize import pack_e5m6, requantize_e5m6_128x1, unpack_e5m6
from .island import eager_island
from .linear import Fp8Linear, linear_backward, quantize_input
from .weights import Fp8Weight


class _AttentionLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_nope: Tensor,
        k_pe: Tensor,
        v: Tensor,
        master: Tensor,
        weight: Fp8Weight,
        cu_seqlens: Tensor,
        softmax_scale: float,
        accumulation: str,
    ) -> Tensor:
        out, lse = mla_attention(q, k_nope, k_pe, v, cu_seqlens, softmax_scale=softmax_scale)
        flat = out.flatten(1)
        kept = pack_e5m6(flat)
        ctx.save_for_backward(q, k_nope, k_pe, v, lse, cu_seqlens, *kept, weight.q_t, weight.scale_t)
        ctx.master, ctx.softmax_scale, ctx.accumulation = master, softmax_scale, accumulation
        pair = quantize_input(flat)
        return fp8_gemm(*pair, weight.q, weight.scale, out_dtype=q.dtype, accumulation=accumulation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k_nope, k_pe, v, lse, cu_seqlens, packed, scale, w_t, w_scale_t = ctx.saved_tensors
        shape = v.shape[1:]
        width = shape.numel()
        x_t = requantize_e5m6_128x1(packed, scale, width) if ctx.needs_input_grad[4] else None
        d_flat, dw = linear_backward(dy, ctx.master, (w_t, w_scale_t), x_t, ctx.accumulation)
        assert d_flat is not None
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if any(ctx.needs_input_grad[:4]):
            out = unpack_e5m6(packed, scale, width, dtype=q.dtype).unflatten(1, shape)
            grads = mla_attention_backward(
                d_flat.unflatten(1, shape), q, k_nope, k_pe, v, out, lse, cu_seqlens, softmax_scale=ctx.softmax_scale
            )  # fmt: skip
        return *grads, dw, None, None, None, None


@eager_island
def attention_linear(
    linear: Fp8Linear,
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """linear(mla_attention(q, k_nope, k_pe, v, cu_seqlens)) [Tq, out_features], causal; operands bf16 or fp32.

    Backward sees attention's output as E5M6 gives it back. linear: takes H * Dv inputs, cache="e5m6".
    """
    width = v.shape[1] * v.shape[2] if v.ndim == 3 else -1
    require(
        linear.in_features == width, "linear", f"must take v's H * Dv = {width} inputs", linear.in_features
    )
    require(linear.cache == "e5m6", "linear", 'must be made with cache="e5m6"', linear.cache)
    inputs = q, k_nope, k_pe, v, linear.weight
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _AttentionLinearFunction.apply(
            *inputs, linear.fp8_weight(), cu_seqlens, softmax_scale, linear.accumulation
        )
    out, _ = mla_attention(q, k_nope, k_pe, v, cu_seqlens, softmax_scale=softmax_scale)
    y: Tensor = linear(out.flatten(1))
    return y
