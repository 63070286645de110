"""Fp8Linear: the report's figure 6 for one Linear operator.

    Fprop   y  = x   W^T     x: 1x128 tiles,  W: 128x128 blocks
    Dgrad   dx = dy  W       dy: 1x128 tiles, W: the same blocks, transposed
    Wgrad   dW = dy^T x      both in 128x1 tiles (128 tokens of one channel), FP32 result

All three multiply E4M3 operands and promote to FP32 every 128 of the contraction (report 3.3.2). The input is
cached for Wgrad in 8 bits; the Linear after attention caches E5M6 instead, because attention's own backward pass
uses the same tensor and is sensitive to its precision (report 3.3.3). The weight is an FP32 master parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._checks import check_choice, require
from ..gemm import fp8_gemm, fp8_wgrad
from ..quantize import pack_e5m6, quantize_1x128, quantize_128x1, requantize_128x1, unpack_e5m6
from .weights import Fp8Weight, Fp8WeightCache

CACHES = ("fp8", "e5m6")


class _Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, master: torch.Tensor, weight: Fp8Weight, cache: str, accumulation: str
    ) -> torch.Tensor:
        # Power-of-two scales, so that the turn from 1x128 to 128x1 tiles in backward adds no rounding.
        q, scale = quantize_1x128(x, pow2=True)
        kept = pack_e5m6(x, granularity="tile") if cache == "e5m6" else (q, scale)
        ctx.save_for_backward(*kept)
        ctx.weight, ctx.cache, ctx.accumulation = weight, cache, accumulation
        ctx.width, ctx.dtype = x.shape[1], x.dtype
        return fp8_gemm(q, scale, weight.q, weight.scale, out_dtype=x.dtype, accumulation=accumulation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        dx = dw = None
        weight: Fp8Weight = ctx.weight
        if ctx.needs_input_grad[0]:
            q, scale = quantize_1x128(dy)
            dx = fp8_gemm(
                q, scale, weight.q_t, weight.scale_t, out_dtype=ctx.dtype, accumulation=ctx.accumulation
            )
        if ctx.needs_input_grad[1]:
            if ctx.cache == "e5m6":
                packed, packed_scale = ctx.saved_tensors
                x = unpack_e5m6(packed, packed_scale, ctx.width, granularity="tile", dtype=torch.float32)
                x_t = quantize_128x1(x, pow2=True)
            else:
                x_t = requantize_128x1(*ctx.saved_tensors)
            dw = fp8_wgrad(*quantize_128x1(dy), *x_t, out_dtype=torch.float32, accumulation=ctx.accumulation)
        return dx, dw, None, None, None


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
        self._weight_cache = Fp8WeightCache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T for x of any leading shape."""
        require(
            x.shape[-1] == self.in_features, "x", f"last dimension must be {self.in_features}", tuple(x.shape)
        )
        flat = x.reshape(-1, self.in_features)
        y = _Fp8LinearFunction.apply(
            flat, self.weight, self._weight_cache(self.weight), self.cache, self.accumulation
        )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and the cache format."""
        return f"{self.in_features}, {self.out_features}, cache={self.cache}"
