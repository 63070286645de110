"""SwiGLU in the steps of csrc/activation; fp64 is left to the fast reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activation as fast
from ..quantize import quantize_1x128
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


swiglu_backward_quantize, swiglu_backward_quantize_grouped = fast.casts_by(swiglu, swiglu_backward)
