"""RMSNorm in the steps of csrc/norm; fp64 is left to the fast reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import norm as fast
from ..quantize import quantize_1x128
from .elementary import rsqrt, sum_of_groups


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return fast.rms_norm(x, weight, eps)
    wide = x.float()
    mean = torch.div(sum_of_groups(wide * wide).float(), wide.new_tensor(x.shape[-1]))
    rstd = rsqrt(mean + torch.tensor(eps, dtype=torch.float32, device=x.device))
    y = wide * rstd.unsqueeze(-1) * weight.float()
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = (x + residual).contiguous()
    y, rstd = rms_norm(new_residual, weight, eps)
    return y, new_residual, rstd


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = rms_norm(x, weight, eps)
    return (*quantize_1x128(y, pow2, False), rstd)


def rms_norm_residual_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, new_residual, rstd = rms_norm_residual(x, residual, weight, eps)
    return (*quantize_1x128(y, pow2, False), rstd, new_residual)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return fast.rms_norm_backward(dy, x, weight, rstd, dresidual)
    width = x.shape[-1]
    wide, grad = x.reshape(-1, width).float(), dy.reshape(-1, width).float()
    wide_weight, rstd = weight.float(), rstd.reshape(-1, 1)
    product = grad * wide
    dweight = sum_of_groups((product * rstd).t()).float()
    dot = sum_of_groups(product * wide_weight).float().unsqueeze(-1)
    coefficient = -torch.div(dot * (rstd * rstd), wide.new_tensor(width))
    dx = (grad * wide_weight + wide * coefficient) * rstd
    if dresidual is not None:
        dx = dx + dresidual.reshape(-1, width).float()
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype)
