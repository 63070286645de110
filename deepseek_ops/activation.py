"""SwiGLU, with the routing weight folded in, alone and with FP8 quantisation (report sections 2.1.2 and 3.3.3).

The input of SwiGLU is what is kept for backward, which computes ``silu(gate)`` again; its output is not kept.
Multiplying by the routing weight here, before the down projection, makes `deepseek_ops.moe.unpermute` a plain sum
and spares it the expert outputs in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import E4M3, ceil_div, check_tensor, fail, round_up
from ._registry import declare
from .reference import activation as reference

__all__ = ["swiglu", "swiglu_backward", "swiglu_quantize"]

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


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate_up, weight = ctx.saved_tensors
    dgate_up, dweight = _swiglu_backward(dy, gate_up, weight)
    return dgate_up, None if weight is None else dweight


_swiglu_backward = declare(
    "swiglu_backward(Tensor dy, Tensor gate_up, Tensor? weight) -> (Tensor dgate_up, Tensor dweight)",
    reference=reference.swiglu_backward,
    fake=_fake_backward,
)
_swiglu = declare(
    "swiglu(Tensor gate_up, Tensor? weight) -> Tensor",
    reference=reference.swiglu,
    fake=lambda gate_up, weight: _fake_out(gate_up),
    save=_save,
    backward=_backward,
)
_swiglu_quantize = declare(
    "swiglu_quantize(Tensor gate_up, Tensor? weight, bool pow2) -> (Tensor q, Tensor scale)",
    reference=reference.swiglu_quantize,
    fake=_fake_quantize,
)
