"""Fp8Experts: the routed experts of DeepSeekMoE in FP8, forward and backward (report 3.3.1-3.3.3, figure 6).

Rows arrive sorted by expert. What is kept for backward, per row: the FP8 input, the FP8 input of SwiGLU (its output
is recomputed), and the routing weight. Activations entering the up-projection and gradients entering the
down-projection's Dgrad carry power-of-two scales, as they do when they cross the network in FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._checks import require
from ..activation import swiglu, swiglu_backward, swiglu_quantize
from ..gemm import fp8_gemm_grouped, fp8_wgrad_grouped
from ..quantize import dequantize_1x128, quantize_1x128, quantize_128x1, requantize_128x1
from .weights import Fp8Weight, Fp8WeightCache


class _Fp8ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        row_weight: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        offsets: torch.Tensor,
        gate_up8: Fp8Weight,
        down8: Fp8Weight,
        accumulation: str,
    ) -> torch.Tensor:
        mode: dict[str, Any] = {"out_dtype": x.dtype, "accumulation": accumulation}
        q, scale = quantize_1x128(x, pow2=True)
        hidden = fp8_gemm_grouped(q, scale, gate_up8.q, gate_up8.scale, offsets, **mode)
        hidden_q, hidden_scale = quantize_1x128(hidden, pow2=True)
        act_q, act_scale = swiglu_quantize(hidden, row_weight)
        ctx.save_for_backward(q, scale, hidden_q, hidden_scale, row_weight, offsets)
        ctx.gate_up8, ctx.down8, ctx.mode = gate_up8, down8, mode
        return fp8_gemm_grouped(act_q, act_scale, down8.q, down8.scale, offsets, **mode)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        q, scale, hidden_q, hidden_scale, row_weight, offsets = ctx.saved_tensors
        gate_up8, down8 = ctx.gate_up8, ctx.down8
        wgrad: dict[str, Any] = {"out_dtype": torch.float32, "accumulation": ctx.mode["accumulation"]}
        hidden = dequantize_1x128(hidden_q, hidden_scale, dtype=dy.dtype)

        dy_q, dy_scale = quantize_1x128(dy, pow2=True)
        d_act = fp8_gemm_grouped(dy_q, dy_scale, down8.q_t, down8.scale_t, offsets, **ctx.mode)
        dy_t, dy_t_scale, padded = quantize_128x1(dy, offsets=offsets)
        act_t, act_t_scale, _ = quantize_128x1(swiglu(hidden, row_weight), offsets=offsets)
        d_down = fp8_wgrad_grouped(dy_t, dy_t_scale, act_t, act_t_scale, padded, **wgrad)

        d_hidden, d_row_weight = swiglu_backward(d_act, hidden, row_weight)
        dh_q, dh_scale = quantize_1x128(d_hidden)
        dx = fp8_gemm_grouped(dh_q, dh_scale, gate_up8.q_t, gate_up8.scale_t, offsets, **ctx.mode)
        dh_t, dh_t_scale, _ = quantize_128x1(d_hidden, offsets=offsets)
        x_t, x_t_scale, _ = requantize_128x1(q, scale, offsets=offsets)
        d_gate_up = fp8_wgrad_grouped(dh_t, dh_t_scale, x_t, x_t_scale, padded, **wgrad)
        return dx, d_row_weight, d_gate_up, d_down, None, None, None, None


class Fp8Experts(nn.Module):
    """E experts, each down(silu(gate(x)) * up(x) * routing weight), grouped by device offsets.

    Parameters (FP32 masters): `gate_up` [E, 2I, D] (gate rows first), `down` [E, D, I].
    """

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, *, accumulation: str = "exact"
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.inner_size = num_experts, hidden_size, inner_size
        self.accumulation = accumulation
        self.gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * inner_size, hidden_size, dtype=torch.float32)
        )
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size, dtype=torch.float32))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.006)
        self._gate_up_cache, self._down_cache = Fp8WeightCache(), Fp8WeightCache()

    def forward(self, x: torch.Tensor, row_weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [R, D] sorted by expert, row_weight fp32 [R], offsets int32 [E+1] on the device -> [R, D]."""
        require(
            x.ndim == 2 and x.shape[1] == self.hidden_size,
            "x",
            f"must be [rows, {self.hidden_size}]",
            tuple(x.shape),
        )
        gate_up8, down8 = self._gate_up_cache(self.gate_up), self._down_cache(self.down)
        return _Fp8ExpertsFunction.apply(
            x, row_weight, self.gate_up, self.down, offsets, gate_up8, down8, self.accumulation
        )
