"""RMSNorm, forward and backward, in fp32 whatever the dtype of the activations (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import quantize_1x128


def inner_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = inner_dtype(x)
    wide = x.to(dtype)
    # The fastest sum of squares: one pass, no product stored.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    y = wide * rstd if wide is x else wide.mul_(rstd)
    y *= weight  # cast inside the product
    return y.to(x.dtype).contiguous(), rstd.squeeze(-1).contiguous()


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = (x + residual).contiguous()
    y, rstd = rms_norm(new_residual, weight, eps)
    return y, new_residual, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With n = x rstd: dx = rstd (w dy - n mean(w dy n)) + dresidual, dw = sum over rows of dy n."""
    dtype, width = inner_dtype(x), x.shape[-1]
    wide, grad = x.reshape(-1, width).to(dtype), dy.reshape(-1, width).to(dtype)
    wide_weight, rstd = weight.to(dtype), rstd.reshape(-1)
    # The product dy x serves both reductions, each a matrix-vector product: over columns for dx, over rows for dw.
    product = grad * wide
    dot = product @ wide_weight
    dweight = product.t() @ rstd
    coefficient = (dot * rstd.square()).div_(-width)
    dx = torch.mul(wide, coefficient[:, None], out=product)
    dx.addcmul_(grad, wide_weight).mul_(rstd[:, None])
    if dresidual is not None:
        dx += dresidual.reshape(-1, width)
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = rms_norm(x, weight, eps)
    return (*quantize_1x128(y, pow2, False), rstd)


def rms_norm_residual_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, new_residual, rstd = rms_norm_residual(x, residual, weight, eps)
    return (*quantize_1x128(y, pow2, False), rstd, new_residual)
