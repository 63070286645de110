"""The gate's product: bf16 operands, FP32 logits, and a gradient that is not cut to bf16 (report 3.3.1: gating stays high).

`gemm` would round the logits' gradient to the operands' dtype before it multiplies. Here it is split into two bf16 numbers,
high and low, whose sum has 16 bits of mantissa; both products accumulate in FP32. What is kept for backward is x itself, not
an FP32 copy of it: 4 bytes per value saved where the router upcasts its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import check_tensor
from ..gemm import gemm, wgrad


class _GateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return gemm(x, weight, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        high = d.to(x.dtype)
        parts = [high] if x.dtype == d.dtype else [high, (d - high.float()).to(x.dtype)]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _sum(gemm, [(part, weight.mT) for part in parts]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _sum(wgrad, [(part, x) for part in parts]).to(weight.dtype)
        return dx, dw


def _sum(product: Any, operands: list[tuple[Tensor, Tensor]]) -> Tensor:
    out: Tensor = product(*operands[0], out_dtype=torch.float32)
    for a, b in operands[1:]:
        product(a, b, out=out, accumulate=True)
    return out


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [T, E] = x [T, D] weight [E, D]^T, both bf16 or both fp32; differentiable once in both."""
    check_tensor("x", x, dtype=(torch.bfloat16, torch.float32), ndim=2)
    check_tensor("weight", weight, dtype=x.dtype, shape=(None, x.shape[1]), device=x.device)
    logits: Tensor = _GateFunction.apply(x, weight)
    return logits
