"""Fp8Experts: the routed experts of DeepSeekMoE in FP8, forward and backward (report 3.3.1-3.3.3, figure 6).

What crosses the network crosses it in FP8 with power-of-two scales: the input of the up-projection on its way to the
experts, and the gradient of the down-projection's output on its way back. Both are quantised before they are copied to the
experts, once per token and not once per chosen expert, and what is quantised is all that an expert knows: Wgrad, too, turns
the FP8 rows. Results on their way back to the tokens stay bf16 and are added in FP32 (the report's combine).

`forward` is an expert's side, on rows that lie sorted by expert. `routed` is the whole layer on one device: dispatch, experts,
combine. `routed` keeps for backward, per token: the FP8 input once, not once per choice; the input of SwiGLU of its top_k rows
in FP8; the routing. SwiGLU's output and the experts' outputs are not kept: the routing weight multiplies inside SwiGLU.
Nothing here reads a device value on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_tensor, require
from ..moe import permute_quantized, unpermute
from ..quantize import quantize_1x128
from .ffn import Rows, ffn_backward, ffn_forward
from .island import eager_island
from .linear import Quantized, check_quantized, quantize_input
from .weights import Fp8Weight, Fp8WeightCache


class _RowsFunction(torch.autograd.Function):
    """Rows sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        gate_up8: Fp8Weight,
        down8: Fp8Weight,
        accumulation: str,
    ) -> Tensor:
        rows = Rows(offsets, accumulation)
        pair = quantize_input(x)
        y, hidden = ffn_forward(rows, pair, gate_up8, down8, row_weight, x.dtype, True)
        copies = gate_up8.q_t, gate_up8.scale_t, down8.q_t, down8.scale_t
        ctx.save_for_backward(*pair, *hidden, row_weight, offsets, *copies)
        ctx.masters, ctx.accumulation, ctx.dtype = (gate_up, down), accumulation, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, hidden, (row_weight, offsets), copies = saved[:2], saved[2:4], saved[4:6], saved[6:]
        dy_q, dy_scale = quantize_1x128(dy, pow2=True)
        rows = Rows(offsets, ctx.accumulation)
        d = ffn_backward(
            rows, (dy_q, dy_scale), x, hidden, row_weight, ctx.masters, copies[:2], copies[2:],
            ctx.needs_input_grad[:4], ctx.dtype,
        )  # fmt: skip
        return *d, None, None, None, None


class _RoutedFunction(torch.autograd.Function):
    """Tokens and their choices: dispatch, experts, combine."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_idx: Tensor,
        gate_up8: Fp8Weight,
        down8: Fp8Weight,
        quantized: Quantized | None,
        accumulation: str,
    ) -> Tensor:
        pair = quantize_input(x) if quantized is None else quantized
        out, hidden, offsets, source = _routed(
            pair, topk_weight, topk_idx, gate_up8, down8, accumulation, x.dtype, True
        )
        copies = gate_up8.q_t, gate_up8.scale_t, down8.q_t, down8.scale_t
        ctx.save_for_backward(*pair, *hidden, topk_weight, topk_idx, offsets, source, *copies)
        ctx.masters, ctx.accumulation, ctx.dtype = (gate_up, down), accumulation, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, hidden, copies = saved[:2], saved[2:4], saved[8:]
        topk_weight, topk_idx, offsets, source = saved[4:8]
        tokens, top_k = topk_idx.shape
        needs = ctx.needs_input_grad[:4]
        experts = offsets.shape[0] - 1
        # topk_idx alone decides the order: rows and gradients come to lie where the forward pass had them.
        dy = permute_quantized(*quantize_input(d_out), topk_idx, experts)[:2]
        x_rows = permute_quantized(x[0], x[1], topk_idx, experts)[:2] if needs[2] else x
        row_weight = topk_weight.flatten().index_select(0, source)
        rows = Rows(offsets, ctx.accumulation)
        d = ffn_backward(
            rows, dy, x_rows, hidden, row_weight, ctx.masters, copies[:2], copies[2:], needs, ctx.dtype
        )
        dx = None if d.x is None else unpermute(d.x, source, tokens, top_k)
        d_weight = None
        if d.row_weight is not None:
            d_weight = torch.empty_like(d.row_weight).index_copy_(0, source, d.row_weight)
            d_weight = d_weight.view(tokens, top_k)
        return dx, d_weight, d.gate_up, d.down, None, None, None, None, None


def _routed(
    pair: Quantized,
    topk_weight: Tensor,
    topk_idx: Tensor,
    gate_up8: Fp8Weight,
    down8: Fp8Weight,
    accumulation: str,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """(output per token, SwiGLU's input for backward, offsets, source)."""
    tokens, top_k = topk_idx.shape
    q, scale, offsets, source = permute_quantized(*pair, topk_idx, gate_up8.q.shape[0])
    row_weight = topk_weight.flatten().index_select(0, source)
    y, hidden = ffn_forward(Rows(offsets, accumulation), (q, scale), gate_up8, down8, row_weight, dtype, keep)
    return unpermute(y, source, tokens, top_k), hidden, offsets, source


class Fp8Experts(nn.Module):
    """E experts, each down(silu(gate(x)) * up(x) * routing weight), grouped by device offsets.

    Parameters (FP32 masters): `gate_up` [E, 2I, D] (gate rows first), `down` [E, D, I].
    """

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, *, accumulation: str = "exact"
    ) -> None:
        super().__init__()
        require(hidden_size % 8 == 0, "hidden_size", "must be a multiple of 8", hidden_size)
        self.num_experts, self.hidden_size, self.inner_size = num_experts, hidden_size, inner_size
        self.accumulation = accumulation
        self.gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * inner_size, hidden_size, dtype=torch.float32)
        )
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size, dtype=torch.float32))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.006)
        self.weight_caches = {"gate_up": Fp8WeightCache(), "down": Fp8WeightCache()}

    @eager_island
    def forward(self, x: Tensor, row_weight: Tensor, offsets: Tensor) -> Tensor:
        """x [R, D] sorted by expert, row_weight fp32 [R], offsets int32 [E+1] on the device -> [R, D]."""
        self._check(x, "rows")
        if self._differentiates(x, row_weight):
            return _RowsFunction.apply(
                x, row_weight, self.gate_up, self.down, offsets, *self.fp8_weights(), self.accumulation
            )
        rows = Rows(offsets, self.accumulation)
        return ffn_forward(rows, quantize_input(x), *self.fp8_weights(False), row_weight, x.dtype, False)[0]

    @eager_island
    def routed(
        self, x: Tensor, topk_weight: Tensor, topk_idx: Tensor, quantized: Quantized | None = None
    ) -> Tensor:
        """Every token's chosen experts, weighted and summed: x [T, D], fp32 [T, k], int64 [T, k] -> [T, D].

        An index outside [0, E) means "not here" and adds nothing. quantized: `quantize_input` of x, if it is there. Equal,
        bit for bit, to `moe.permute`, `forward`, `moe.unpermute`; it keeps less and copies fewer bytes.
        """
        self._check(x, "tokens")
        check_tensor("topk_idx", topk_idx, dtype=torch.int64, shape=(x.shape[0], None), device=x.device)
        check_tensor("topk_weight", topk_weight, dtype=torch.float32, shape=topk_idx.shape, device=x.device)
        if quantized is not None:
            check_quantized(quantized, x)
        if self._differentiates(x, topk_weight):
            return _RoutedFunction.apply(
                x, topk_weight, self.gate_up, self.down, topk_idx, *self.fp8_weights(), quantized, self.accumulation
            )  # fmt: skip
        pair = quantize_input(x) if quantized is None else quantized
        weights = self.fp8_weights(False)
        return _routed(pair, topk_weight, topk_idx, *weights, self.accumulation, x.dtype, False)[0]

    def fp8_weights(self, transposed: bool = True) -> tuple[Fp8Weight, Fp8Weight]:
        """The FP8 copies of `gate_up` and `down`; see `Fp8WeightCache`."""
        caches = self.weight_caches
        gate_up = caches["gate_up"](self.gate_up, transposed=transposed)
        return gate_up, caches["down"](self.down, transposed=transposed)

    def _check(self, x: Tensor, rows: str) -> None:
        rule = f"must be [{rows}, {self.hidden_size}]"
        require(x.ndim == 2 and x.shape[1] == self.hidden_size, "x", rule, tuple(x.shape))

    def _differentiates(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, self.gate_up, self.down))
