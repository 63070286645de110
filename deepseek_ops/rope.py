"""Rotary position embedding as DeepSeek-V3 uses it, with YaRN (report section 2.1.1 and 4.3).

Pairs are interleaved: elements 2i and 2i + 1 of a vector form a complex number, as in the released code. A cache
of rotated keys has this order too. Hugging Face keeps the two halves apart instead: `interleaved_to_half` and
`half_to_interleaved` convert.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_range, check_tensor, fail, require
from ._registry import declare
from .reference import rope as reference

__all__ = [
    "half_to_interleaved",
    "interleaved_to_half",
    "rope",
    "softmax_scale",
    "yarn_inv_freq",
    "yarn_mscale",
]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, inv_freq, inverse = inputs
    ctx.save_for_backward(positions, inv_freq)
    ctx.inverse = inverse


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _rope(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope = declare(
    "rope(Tensor x, Tensor positions, Tensor inv_freq, bool inverse) -> Tensor",
    reference=reference.rope,
    fake=lambda x, positions, inv_freq, inverse: torch.empty_like(x, memory_format=torch.contiguous_format),
    save=_save,
    backward=_backward,
)


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the pairs (x[..., 2i], x[..., 2i+1]) of token t by the angle positions[t] * inv_freq[i].

    x: [T, Dr] (the shared k_pe) or [T, ..., Dr], usually [T, H, Dr] (q_pe); bf16, fp32 or fp64; Dr even.
    positions: int64 [T], any values; packed documents restart at 0. inv_freq: fp32 [Dr / 2] in radians per
    position, see `yarn_inv_freq`. inverse: rotate back (the exact transpose).

    The angle is one fp32 product, the rotation is fp32, the result has x's dtype and is a fresh contiguous tensor.
    Differentiable in x; the gradient is the inverse rotation of the incoming one. Raises `ArgumentError`.
    """
    check_tensor("x", x, dtype=(torch.bfloat16, torch.float32, torch.float64))
    if x.ndim < 2:
        fail("x", "must have at least 2 dimensions [T, ..., Dr]", f"shape {tuple(x.shape)}")
    if x.shape[-1] % 2:
        fail("x", "must have an even last dimension", f"shape {tuple(x.shape)}")
    check_tensor("positions", positions, dtype=torch.int64, shape=(x.shape[0],), device=x.device)
    check_tensor("inv_freq", inv_freq, dtype=torch.float32, shape=(x.shape[-1] // 2,), device=x.device)
    return _rope(x, positions, inv_freq, inverse)


def yarn_inv_freq(
    dim: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_max: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Frequencies of RoPE, stretched by YaRN: fp32 [dim / 2], radians per position (report section 4.3).

    A frequency that turns more than `beta_fast` times within `original_max` positions is kept, one that turns
    less than `beta_slow` times is divided by `factor`, and in between the two are mixed linearly in the index.
    factor 1 is plain RoPE. The report: dim 64, base 10000, factor 40 (32k: 8), original 4096, beta 32 and 1.
    """
    require(dim > 0 and dim % 2 == 0, "dim", "must be positive and even", dim)
    check_range("factor", factor, low=1.0)
    require(base > 1, "base", "must be greater than 1", base)
    require(original_max >= 1, "original_max", "must be at least 1", original_max)
    require(beta_fast >= beta_slow > 0, "beta_fast", "must be at least beta_slow > 0", (beta_fast, beta_slow))
    index = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    # fp32 in this order on purpose: the released model was trained with these roundings.
    inv_freq = 1.0 / base ** (index / dim)
    if factor == 1:
        return inv_freq

    def index_that_turns(times: float) -> float:
        return dim * math.log(original_max / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(index_that_turns(beta_fast)), 0)
    high = min(math.ceil(index_that_turns(beta_slow)), dim - 1)
    ramp = ((index / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's correction of attention's temperature: 0.1 mscale ln(factor) + 1 (1.368888 at factor 40)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(qk_dim: int, yarn_factor: float = 1.0, mscale_all_dim: float = 1.0) -> float:
    """The scale of MLA's scores: qk_dim^-0.5 mscale^2, with qk_dim = nope + rope (192 in V3).

    The same number holds for absorbed decode, whose vectors are longer (576) but whose scores are equal.
    0.0721688 for 192; 0.1352338 under YaRN with factor 40.
    """
    require(qk_dim > 0, "qk_dim", "must be positive", qk_dim)
    return float(qk_dim**-0.5 * yarn_mscale(yarn_factor, mscale_all_dim) ** 2)


def _check_even(x: Tensor) -> None:
    check_tensor("x", x)
    ok = x.ndim >= 1 and x.shape[-1] % 2 == 0
    require(ok, "x", "must have an even last dimension", f"shape {tuple(x.shape)}")


def interleaved_to_half(x: Tensor) -> Tensor:
    """Reorder the last axis from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...), Hugging Face's order."""
    _check_even(x)
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def half_to_interleaved(x: Tensor) -> Tensor:
    """Reorder the last axis from (x0, x1, ..., y0, y1, ...) to (x0, y0, x1, y1, ...), the order of this library."""
    _check_even(x)
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
