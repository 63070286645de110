"""Fp8Linear: the report's figure 6 for one Linear operator.

    Fprop   y  = x   W^T     x: 1x128 tiles,  W: 128x128 blocks
    Dgrad   dx = dy  W       dy: 1x128 tiles, W: the same blocks, transposed
    Wgrad   dW = dy^T x      both in 128x1 tiles (128 tokens of one channel), FP32 result

All three multiply E4M3 operands and promote to FP32 every 128 of the contraction (report 3.3.2). The input is
cached for Wgrad in 8 bits, never in bf16; the Linear after attention caches E5M6 instead, because attention's own backward
pass uses the same tensor and is sensitive to its precision (report 3.3.3; `attention_linear` keeps one copy for both).
The weight is an FP32 master parameter; see `weights` for its copies and `gradients` for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_choice, check_tensor, require
from ..gemm import fp8_gemm, fp8_wgrad
from ..quantize import (
    pack_e5m6,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_128x1,
    requantize_128x1,
    requantize_e5m6_128x1,
)
from .gradients import weight_gradient
from .island import eager_island
from .weights import Fp8Weight, Fp8WeightCache

CACHES = ("fp8", "e5m6")
Quantized = tuple[Tensor, Tensor]


def quantize_input(x: Tensor) -> Quantized:
    """x [T, K] as the FP8 modules cache it: 1x128 tiles with power-of-two scales, (q, scale).

    Powers of two, so that the turn from 1x128 to 128x1 tiles in backward adds no rounding. Several modules that read one
    tensor can share the result, and then keep it once.
    """
    q, scale = quantize_1x128(x, pow2=True)
    return q, scale


def linear_backward(
    dy: Tensor,
    master: Tensor,
    weight: tuple[Tensor, Tensor] | None,
    x_t: tuple[Tensor, ...] | None,
    accumulation: str,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dW) for dy [T, N]. weight: the transposed copies, None if dx is not wanted; x_t: the turned input, None if dW
    is not. One read of dy makes both quantised forms when both are wanted."""
    rows: Quantized | None = None
    columns: tuple[Tensor, ...] | None = None
    if weight is not None and x_t is not None:
        q, scale, *turned = quantize_1x128_128x1(dy)
        rows, columns = (q, scale), tuple(turned)
    elif weight is not None:
        rows = quantize_1x128(dy)
    elif x_t is not None:
        columns = quantize_128x1(dy)
    dx = dw = None
    if rows is not None and weight is not None:
        mode: dict[str, Any] = {"out_dtype": dy.dtype, "accumulation": accumulation}
        dx = fp8_gemm(*rows, *weight, **mode)
    if columns is not None and x_t is not None:
        dw = weight_gradient(master, fp8_wgrad, *columns, *x_t, accumulation=accumulation)
    return dx, dw


class _Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        master: Tensor,
        weight: Fp8Weight,
        quantized: Quantized | None,
        cache: str,
        accumulation: str,
    ) -> Tensor:
        q, scale = quantize_input(x) if quantized is None else quantized
        kept: tuple[Tensor | None, ...] = (None, None)
        if ctx.needs_input_grad[1]:
            kept = pack_e5m6(x) if cache == "e5m6" else (q, scale)
        # The weight's copies too, so that autograd notices when they are refreshed before this graph is done.
        ctx.save_for_backward(*kept, weight.q_t, weight.scale_t)
        ctx.master, ctx.cache, ctx.accumulation, ctx.width = master, cache, accumulation, x.shape[1]
        return fp8_gemm(q, scale, weight.q, weight.scale, out_dtype=x.dtype, accumulation=accumulation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, kept_scale, w_t, w_scale_t = ctx.saved_tensors
        x_t = None
        if kept is not None:
            x_t = (
                requantize_e5m6_128x1(kept, kept_scale, ctx.width)
                if ctx.cache == "e5m6"
                else requantize_128x1(kept, kept_scale)
            )
        weight = (w_t, w_scale_t) if ctx.needs_input_grad[0] else None
        dx, dw = linear_backward(dy, ctx.master, weight, x_t, ctx.accumulation)
        return dx, dw, None, None, None, None


class Fp8Linear(nn.Module):
    """Linear without bias, computed in FP8 in all three passes.

    Parameter: `weight` FP32 [out_features, in_features], the master copy.
    Input bf16 or fp32 [..., in_features]; output in the same dtype [..., out_features].
    cache: "fp8" keeps the quantised input for Wgrad (1 byte per value), "e5m6" keeps 12 bits (after attention).
    accumulation: see `deepseek_ops.gemm`; "hopper" is bit-accurate to the tensor core, slow on a CPU.
    """

    def __init__(
        self, in_features: int, out_features: int, *, cache: str = "fp8", accumulation: str = "exact"
    ) -> None:
        super().__init__()
        check_choice("cache", cache, CACHES)
        require(
            in_features % 8 == 0, "in_features", "must be a multiple of 8 (E5M6 packs 8 values)", in_features
        )
        self.in_features, self.out_features = in_features, out_features
        self.cache, self.accumulation = cache, accumulation
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.006)
        self.weight_caches = {"weight": Fp8WeightCache()}

    @eager_island
    def forward(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        """y = x W^T for x of any leading shape. quantized: `quantize_input` of x [T, in_features], if it is there."""
        require(
            x.shape[-1] == self.in_features, "x", f"last dimension must be {self.in_features}", tuple(x.shape)
        )
        flat = x.reshape(-1, self.in_features)
        if quantized is not None:
            check_quantized(quantized, flat)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            y = _Fp8LinearFunction.apply(
                flat, self.weight, self.fp8_weight(x.requires_grad), quantized, self.cache, self.accumulation
            )
        else:
            weight = self.fp8_weight(False)
            q, scale = quantize_input(flat) if quantized is None else quantized
            mode: dict[str, Any] = {"out_dtype": x.dtype, "accumulation": self.accumulation}
            y = fp8_gemm(q, scale, weight.q, weight.scale, **mode)
        return y.view(*x.shape[:-1], self.out_features)

    def fp8_weight(self, transposed: bool = True) -> Fp8Weight:
        """The FP8 copies of the present weight; see `Fp8WeightCache`."""
        return self.weight_caches["weight"](self.weight, transposed=transposed)

    def extra_repr(self) -> str:
        """Sizes and the cache format."""
        return f"{self.in_features}, {self.out_features}, cache={self.cache}"


def check_quantized(quantized: Quantized, x: Tensor) -> None:
    """That `quantized` can be `quantize_input(x)`: shapes, dtypes, device."""
    q, scale = quantized
    check_tensor("quantized[0]", q, dtype=torch.float8_e4m3fn, shape=x.shape, device=x.device)
    shape = (-(-x.shape[1] // 128), -(-x.shape[0] // 4) * 4)
    check_tensor("quantized[1]", scale, dtype=torch.float32, shape=shape, device=x.device)
