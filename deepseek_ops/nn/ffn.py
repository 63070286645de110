"""SwiGLU between two FP8 products, forward and backward: what a dense FFN and routed experts share (figure 6, 3.3.3).

    forward    hidden = x W1^T            kept: x in FP8 (it is the caller's), hidden in FP8
               y = (swiglu(hidden) * weight of the row) W2^T
    backward   hidden from FP8; swiglu again; its gradient; four products

The input of SwiGLU is kept in 1x128 tiles with power-of-two scales: then its values are exact in bf16 too, and it does not
matter at which width a kernel recomputes from them. SwiGLU's output is never kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import swiglu, swiglu_backward, swiglu_backward_quantize, swiglu_quantize
from ..gemm import fp8_gemm, fp8_gemm_grouped, fp8_wgrad, fp8_wgrad_grouped
from ..quantize import (
    dequantize_1x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_128x1,
    requantize_128x1,
)
from .gradients import weight_gradient
from .weights import Fp8Weight

Pair = tuple[Tensor, Tensor]


class Rows:
    """How rows meet weights: all rows and one weight, or, with `offsets`, the rows of each group and its own.

    The grouped forms take device offsets; no size is ever read on the host.
    """

    def __init__(self, offsets: Tensor | None, accumulation: str) -> None:
        self.offsets, self.accumulation = offsets, accumulation
        self.padded: Tensor | None = None  # groups padded to 128 tokens: where they lie in turned operands

    def gemm(self, a: Pair, weight: Pair, dtype: torch.dtype) -> Tensor:
        """a W^T."""
        mode: dict[str, Any] = {"out_dtype": dtype, "accumulation": self.accumulation}
        if self.offsets is None:
            return fp8_gemm(*a, *weight, **mode)
        return fp8_gemm_grouped(*a, *weight, self.offsets, **mode)

    def turned(self, x: Tensor) -> Pair:
        """x in 128x1 tiles, stored transposed."""
        if self.offsets is None:
            q_t, scale_t = quantize_128x1(x)
        else:
            q_t, scale_t, self.padded = quantize_128x1(x, offsets=self.offsets)
        return q_t, scale_t

    def both(self, x: Tensor) -> tuple[Pair, Pair]:
        """x in 1x128 tiles, and turned, from one read."""
        if self.offsets is None:
            q, scale, q_t, scale_t = quantize_1x128_128x1(x)
        else:
            q, scale, q_t, scale_t, self.padded = quantize_1x128_128x1(x, offsets=self.offsets)
        return (q, scale), (q_t, scale_t)

    def requantized(self, x: Pair) -> Pair:
        """1x128 tiles turned: power-of-two scales."""
        if self.offsets is None:
            q_t, scale_t = requantize_128x1(*x)
        else:
            q_t, scale_t, self.padded = requantize_128x1(*x, offsets=self.offsets)
        return q_t, scale_t

    def weight_gradient(self, master: Tensor, dy_t: Pair, x_t: Pair) -> Tensor | None:
        """dy^T x per group, for autograd, or None once it was added to the master's `.grad`."""
        if self.offsets is None:
            return weight_gradient(master, fp8_wgrad, *dy_t, *x_t, accumulation=self.accumulation)
        assert self.padded is not None
        return weight_gradient(
            master, fp8_wgrad_grouped, *dy_t, *x_t, self.padded, accumulation=self.accumulation
        )


class Gradients(NamedTuple):
    """Of an FFN's inputs; None where nobody wanted one, or where a weight's went into its `.grad`."""

    x: Tensor | None
    row_weight: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None


def ffn_forward(
    rows: Rows,
    x: Pair,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    row_weight: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Pair | tuple[None, None]]:
    """(y in `dtype`, the input of SwiGLU as backward needs it, if `keep`)."""
    hidden = rows.gemm(x, (gate_up.q, gate_up.scale), dtype)
    kept: Pair | tuple[None, None] = (None, None)
    if keep:
        q, scale = quantize_1x128(hidden, pow2=True)
        kept = q, scale
    act = swiglu_quantize(hidden, row_weight)
    return rows.gemm(act, (down.q, down.scale), dtype), kept


def fuses(hidden: Pair, dtype: torch.dtype) -> bool:
    """Whether one kernel takes SwiGLU's backward pass and its three casts: bf16, whole tiles of gate and of up."""
    return dtype == torch.bfloat16 and hidden[0].shape[1] % 256 == 0


def ffn_backward(
    rows: Rows,
    dy: Tensor | Pair,
    x: Pair,
    hidden: Pair,
    row_weight: Tensor | None,
    masters: Pair,
    gate_up_t: Pair,
    down_t: Pair,
    needs: tuple[bool, bool, bool, bool],
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of x, row_weight and the two weights, as `needs` says.

    dy: bf16 or fp32; or a pair in FP8, as it arrives from the network, which is then also what Wgrad sees.
    """
    need_x, need_row_weight, need_gate_up, need_down = needs
    d_row_weight = d_gate_up = d_down = dx = None
    dy_t: Pair | None = None
    if isinstance(dy, Tensor):
        if need_down:
            dy, dy_t = rows.both(dy)
        else:
            q, scale = quantize_1x128(dy)
            dy = q, scale
    elif need_down:
        dy_t = rows.requantized(dy)
    if need_gate_up and dy_t is not None and fuses(hidden, dtype):
        d_act = rows.gemm(dy, down_t, dtype)
        casts = swiglu_backward_quantize(
            d_act, hidden[0], row_weight, gate_up_scale=hidden[1], offsets=rows.offsets
        )
        dh, d_row_weight = (casts.q, casts.scale), casts.dweight
        d_down = rows.weight_gradient(masters[1], dy_t, (casts.act_t, casts.act_scale_t))
        d_gate_up = rows.weight_gradient(masters[0], (casts.q_t, casts.scale_t), rows.requantized(x))
        dx = rows.gemm(dh, gate_up_t, dtype) if need_x else None
        return Gradients(dx, d_row_weight, d_gate_up, d_down)
    # The same in steps: where something is frozen, and for widths and types that the one kernel does not take.
    values = dequantize_1x128(*hidden, dtype=dtype)
    if dy_t is not None:
        act_t = rows.turned(swiglu(values, row_weight))
        d_down = rows.weight_gradient(masters[1], dy_t, act_t)
    if need_x or need_gate_up or need_row_weight:
        d_act = rows.gemm(dy, down_t, dtype)
        d_hidden, d_row_weight = swiglu_backward(d_act, values, row_weight)
        if need_gate_up:
            dh, dh_t = rows.both(d_hidden)
            d_gate_up = rows.weight_gradient(masters[0], dh_t, rows.requantized(x))
        else:
            q, scale = quantize_1x128(d_hidden)
            dh = q, scale
        if need_x:
            dx = rows.gemm(dh, gate_up_t, dtype)
    return Gradients(dx, d_row_weight, d_gate_up, d_down)
