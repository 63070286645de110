"""Fp8MLP: a dense FFN or the shared experts, down(silu(gate(x)) * up(x)), as one differentiable step.

For backward it keeps x and the input of SwiGLU, both in FP8: 1 + 2 I / D bytes per input value (and scales), where two
separate Linears and a SwiGLU between them would keep SwiGLU's input in bf16 and its output besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import require
from .ffn import Rows, ffn_backward, ffn_forward
from .island import eager_island
from .linear import Fp8Linear, Quantized, check_quantized, quantize_input
from .weights import Fp8Weight


class _Fp8MLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up8: Fp8Weight,
        down8: Fp8Weight,
        quantized: Quantized | None,
        accumulation: str,
    ) -> Tensor:
        pair = quantize_input(x) if quantized is None else quantized
        rows = Rows(None, accumulation)
        y, hidden = ffn_forward(rows, pair, gate_up8, down8, None, x.dtype, True)
        ctx.save_for_backward(*pair, *hidden, gate_up8.q_t, gate_up8.scale_t, down8.q_t, down8.scale_t)
        ctx.masters, ctx.rows, ctx.dtype = (gate_up, down), rows, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, hidden, gate_up_t, down_t = saved[:2], saved[2:4], saved[4:6], saved[6:]
        need_x, need_gate_up, need_down = ctx.needs_input_grad[:3]
        needs = (need_x, False, need_gate_up, need_down)
        d = ffn_backward(ctx.rows, dy, x, hidden, None, ctx.masters, gate_up_t, down_t, needs, ctx.dtype)
        return d.x, d.gate_up, d.down, None, None, None, None


class Fp8MLP(nn.Module):
    """down(silu(gate) * up) with gate, up the halves of gate_up(x); no biases.

    Parameters: `gate_up.weight` FP32 [2 I, D] (gate rows first), `down.weight` FP32 [D, I], of two `Fp8Linear`.
    """

    def __init__(self, hidden_size: int, inner_size: int, *, accumulation: str = "exact") -> None:
        super().__init__()
        self.gate_up = Fp8Linear(hidden_size, 2 * inner_size, accumulation=accumulation)
        self.down = Fp8Linear(inner_size, hidden_size, accumulation=accumulation)
        self.hidden_size, self.accumulation = hidden_size, accumulation

    @eager_island
    def forward(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        """x bf16 or fp32 [..., D] -> [..., D]. quantized: `quantize_input` of x as [T, D], if it is there."""
        require(
            x.shape[-1] == self.hidden_size, "x", f"last dimension must be {self.hidden_size}", tuple(x.shape)
        )
        flat = x.reshape(-1, self.hidden_size)
        if quantized is not None:
            check_quantized(quantized, flat)
        masters = self.gate_up.weight, self.down.weight
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *masters)):
            weights = self.gate_up.fp8_weight(), self.down.fp8_weight()
            y = _Fp8MLPFunction.apply(flat, *masters, *weights, quantized, self.accumulation)
        else:
            weights = self.gate_up.fp8_weight(False), self.down.fp8_weight(False)
            pair = quantize_input(flat) if quantized is None else quantized
            y, _ = ffn_forward(Rows(None, self.accumulation), pair, *weights, None, x.dtype, False)
        return y.view(x.shape)
