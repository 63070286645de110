"""SwiGLU in the steps of csrc/activation; fp64 is left to the fast reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activation as fast
from ..activation import Casts, values_of
from ..quantize import (
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_1x128_128x1_grouped,
    quantize_128x1,
    quantize_128x1_grouped,
)
from .elementary import sigmoid, sum_of_groups


def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    if gate_up.dtype == torch.float64:
        return fast.swiglu(gate_up, weight)
    gate, up = gate_up.contiguous().float().chunk(2, -1)
    product = gate * sigmoid(gate) * up
    if weight is not None:
        product = product * weight.unsqueeze(-1)
    return product.to(gate_up.dtype)


def swiglu_quantize(gate_up: Tensor, weight: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_1x128(swiglu(gate_up, weight), pow2, False)


def swiglu_backward(dy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate_up.dtype == torch.float64:
        return fast.swiglu_backward(dy, gate_up, weight)
    gate, up = gate_up.contiguous().float().chunk(2, -1)
    grad = dy.float()
    s = sigmoid(gate)
    silu, product = gate * s, grad * up
    dweight = dy.new_empty(0) if weight is None else sum_of_groups(product * silu).float()
    if weight is not None:
        product_weighted, silu_weighted = product * weight.unsqueeze(-1), silu * weight.unsqueeze(-1)
    else:
        product_weighted, silu_weighted = product, silu
    dgate = product_weighted * (s * (1 + gate * (1 - s)))
    return torch.cat([dgate, silu_weighted * grad], -1).to(gate_up.dtype), dweight


def swiglu_backward_quantize(
    dy: Tensor, gate_up: Tensor, gate_up_scale: Tensor | None, weight: Tensor | None, pow2: bool
) -> Casts:
    gate_up = values_of(gate_up, gate_up_scale, dy.dtype)
    dgate_up, dweight = swiglu_backward(dy, gate_up, weight)
    act_t, act_scale_t = quantize_128x1(swiglu(gate_up, weight), pow2)
    return (*quantize_1x128_128x1(dgate_up, pow2), act_t, act_scale_t, dweight)


def swiglu_backward_quantize_grouped(
    dy: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    pow2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate_up = values_of(gate_up, gate_up_scale, dy.dtype)
    dgate_up, dweight = swiglu_backward(dy, gate_up, weight)
    q, scale, q_t, scale_t, padded = quantize_1x128_128x1_grouped(dgate_up, offsets, pow2)
    act_t, act_scale_t, _ = quantize_128x1_grouped(swiglu(gate_up, weight), offsets, pow2)
    return q, scale, q_t, scale_t, act_t, act_scale_t, dweight, padded
