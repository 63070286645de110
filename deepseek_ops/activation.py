"""SwiGLU, with the routing weight folded in, alone and with FP8 quantisation (report sections 2.1.2 and 3.3.3).

The input of SwiGLU is what is kept for backward, which computes ``silu(gate)`` again; its output is not kept.
Multiplying by the routing weight here, before the down projection, makes `deepseek_ops.moe.unpermute` a plain sum
and spares it the expert outputs in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import E4M3, ceil_div, check_tensor, fail, require, round_up
from ._registry import declare
from .reference import activation as reference
from .reference.modelled import activation as modelled
from .reference.quantize import padded_tokens

__all__ = ["SwigluCasts", "swiglu", "swiglu_backward", "swiglu_backward_quantize", "swiglu_quantize"]

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def swiglu(gate_up: Tensor, weight: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weight`` with ``gate, up = gate_up[..., :I], gate_up[..., I:]``.

    gate_up: bf16, fp32 or fp64 [..., 2 I], usually [T, 2 I]. weight: fp32 [...], one per row, or None for ones (fp64
    with fp64). Returns [..., I] in gate_up's dtype: fp32 inside, in that order of products, rounded once.
    Differentiable in gate_up and weight. Raises `ArgumentError`.
    """
    _check(gate_up, weight)
    out: Tensor = _swiglu(gate_up, weight)
    return out


def swiglu_backward(
    dy: Tensor, gate_up: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `swiglu` for dy [..., I]: (dgate_up [..., 2 I], dweight fp32 [...] or None).

    For those who write their own autograd around it, as `deepseek_ops.nn.Fp8Experts` does: gate_up may be a
    dequantised copy, from which the activation is recomputed. Not differentiable. Raises `ArgumentError`.
    """
    _check(gate_up, weight)
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    check_tensor("dy", dy, dtype=gate_up.dtype, shape=shape, device=gate_up.device)
    dgate_up, dweight = _swiglu_backward(dy, gate_up, weight)
    return dgate_up, None if weight is None else dweight


def swiglu_quantize(
    gate_up: Tensor, weight: Tensor | None = None, *, pow2: bool = False
) -> tuple[Tensor, Tensor]:
    """SwiGLU of ``gate_up [T, 2 I]`` (bf16 or fp32), quantised in 1 x 128 tiles for the down projection.

    Returns (q e4m3 [T, I], scale fp32 [ceil(I / 128), round_up(T, 4)], GEMM-ready): bit for bit those of
    ``quantize_1x128(swiglu(gate_up, weight), pow2=pow2)``, that is, rounded to gate_up's dtype in between.
    Not differentiable. Raises `ArgumentError`.
    """
    check_tensor("gate_up", gate_up, dtype=(torch.bfloat16, torch.float32), ndim=2)
    _check(gate_up, weight)
    return _swiglu_quantize(gate_up, weight, pow2)


class SwigluCasts(NamedTuple):
    """What `swiglu_backward_quantize` returns; scales are GEMM-ready, T' is T padded to 128 (`padded_tokens` by groups)."""

    q: Tensor  # e4m3 [T, 2 I], dgate_up in 1 x 128 tiles: for Dgrad
    scale: Tensor  # fp32 [2 I / 128, round_up(T, 4)]
    q_t: Tensor  # e4m3 [2 I, T'], dgate_up in 128 x 1 tiles, transposed: for the Wgrad of gate and up
    scale_t: Tensor  # fp32 [T' / 128, 2 I]
    act_t: Tensor  # e4m3 [I, T'], swiglu(gate_up, weight) in 128 x 1 tiles, transposed: for the Wgrad of down
    act_scale_t: Tensor  # fp32 [T' / 128, I]
    dweight: Tensor | None  # fp32 [T]
    padded_offsets: Tensor | None  # int32 [G + 1]


def swiglu_backward_quantize(
    dy: Tensor,
    gate_up: Tensor,
    weight: Tensor | None = None,
    *,
    gate_up_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    pow2: bool = False,
) -> SwigluCasts:
    """`swiglu_backward` of dy [T, I] and the three casts that training needs behind it, from one read (section 3.3.3).

    Bit for bit the composition of ``swiglu_backward``, ``quantize_1x128_128x1`` of dgate_up and ``quantize_128x1`` of
    ``swiglu(gate_up, weight)``, the activation computed again. I is a multiple of 128, T is free.
    gate_up: bf16 [T, 2 I]; or, with ``gate_up_scale`` fp32 [2 I / 128, round_up(T, 4)], its FP8 copy as `quantize_1x128`
    returns it: then the values are ``dequantize_1x128(gate_up, gate_up_scale, dtype=dy.dtype)``.
    offsets: int32 [G + 1]; groups of rows are padded to 128 in the transposed outputs as `quantize_128x1` does it, and
    dweight and the 1 x 128 codes of rows of no group are computed all the same.
    dy is bf16 (fp32 too on the reference). Not differentiable. Raises `ArgumentError`.
    """
    check_tensor("dy", dy, dtype=(torch.bfloat16, torch.float32), ndim=2)
    tokens, inner = dy.shape
    require(inner % 128 == 0, "dy", "must have a multiple of 128 columns", f"shape {tuple(dy.shape)}")
    dtype = dy.dtype if gate_up_scale is None else E4M3
    check_tensor("gate_up", gate_up, dtype=dtype, shape=(tokens, 2 * inner), device=dy.device)
    if gate_up_scale is not None:
        shape = (2 * inner // 128, round_up(tokens, 4))
        check_tensor("gate_up_scale", gate_up_scale, dtype=torch.float32, shape=shape, device=dy.device)
    if weight is not None:
        check_tensor("weight", weight, dtype=torch.float32, shape=(tokens,), device=dy.device)
    if offsets is None:
        *casts, dweight = _swiglu_backward_quantize(dy, gate_up, gate_up_scale, weight, pow2)
        padded = None
    else:
        check_tensor("offsets", offsets, dtype=torch.int32, ndim=1, device=dy.device)
        require(
            offsets.shape[0] >= 1, "offsets", "must have one element more than groups", tuple(offsets.shape)
        )
        *casts, dweight, padded = _swiglu_backward_quantize_grouped(
            dy, gate_up, gate_up_scale, weight, offsets, pow2
        )
    return SwigluCasts._make((*casts, None if weight is None else dweight, padded))


def _check(gate_up: Tensor, weight: Tensor | None) -> None:
    check_tensor("gate_up", gate_up, dtype=_FLOATS)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        fail("gate_up", "must have shape [..., 2 I]", f"shape {tuple(gate_up.shape)}")
    if weight is not None:
        dtype = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
        check_tensor("weight", weight, dtype=dtype, shape=gate_up.shape[:-1], device=gate_up.device)


# Declarations: schema, meaning, shapes, gradient.


def _fake_out(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_backward(dy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), dy.new_empty(0) if weight is None else weight.new_empty(
        weight.shape
    )


def _fake_quantize(gate_up: Tensor, weight: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    scale = gate_up.new_empty((ceil_div(inner, 128), round_up(rows, 4)), dtype=torch.float32)
    return gate_up.new_empty((rows, inner), dtype=E4M3), scale


def _fake_codes(like: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    scale = like.new_empty((ceil_div(length, 128), round_up(rows, 4)), dtype=torch.float32)
    return like.new_empty((rows, length), dtype=E4M3), scale


def _fake_casts(dy: Tensor, weight: Tensor | None, padded: int) -> tuple[Tensor, ...]:
    tokens, inner = dy.shape
    return (
        *_fake_codes(dy, tokens, 2 * inner),
        *_fake_codes(dy, 2 * inner, padded),
        *_fake_codes(dy, inner, padded),
        dy.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    )


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate_up, weight = ctx.saved_tensors
    dgate_up, dweight = _swiglu_backward(dy, gate_up, weight)
    return dgate_up, None if weight is None else dweight


_swiglu_backward = declare(
    "swiglu_backward(Tensor dy, Tensor gate_up, Tensor? weight) -> (Tensor dgate_up, Tensor dweight)",
    reference=reference.swiglu_backward,
    modelled=modelled.swiglu_backward,
    fake=_fake_backward,
)
_swiglu = declare(
    "swiglu(Tensor gate_up, Tensor? weight) -> Tensor",
    reference=reference.swiglu,
    modelled=modelled.swiglu,
    fake=lambda gate_up, weight: _fake_out(gate_up),
    save=_save,
    backward=_backward,
)
_swiglu_quantize = declare(
    "swiglu_quantize(Tensor gate_up, Tensor? weight, bool pow2) -> (Tensor q, Tensor scale)",
    reference=reference.swiglu_quantize,
    modelled=modelled.swiglu_quantize,
    fake=_fake_quantize,
)
_swiglu_backward_quantize = declare(
    "swiglu_backward_quantize(Tensor dy, Tensor gate_up, Tensor? gate_up_scale, Tensor? weight, bool pow2)"
    " -> (Tensor q, Tensor scale, Tensor q_t, Tensor scale_t, Tensor act_t, Tensor act_scale_t, Tensor dweight)",
    reference=reference.swiglu_backward_quantize,
    modelled=modelled.swiglu_backward_quantize,
    fake=lambda dy, gate_up, gate_up_scale, weight, pow2: _fake_casts(dy, weight, round_up(dy.shape[0], 128)),
)
_swiglu_backward_quantize_grouped = declare(
    "swiglu_backward_quantize_grouped(Tensor dy, Tensor gate_up, Tensor? gate_up_scale, Tensor? weight, Tensor offsets,"
    " bool pow2) -> (Tensor q, Tensor scale, Tensor q_t, Tensor scale_t, Tensor act_t, Tensor act_scale_t, Tensor dweight,"
    " Tensor padded_offsets)",
    reference=reference.swiglu_backward_quantize_grouped,
    modelled=modelled.swiglu_backward_quantize_grouped,
    fake=lambda dy, gate_up, gate_up_scale, weight, offsets, pow2: (
        *_fake_casts(dy, weight, padded_tokens(dy.shape[0], offsets.shape[0] - 1)),
        offsets.new_empty(offsets.shape),
    ),
)
