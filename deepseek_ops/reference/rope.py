"""Rotary position embedding on interleaved pairs: the meaning of the op in pure PyTorch."""

from __future__ import annotations

import torch


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Rotate (x[2i], x[2i+1]) by the angle position * inv_freq[i], or by its negative.

    The angle is one fp32 product, its sine and cosine and the rotation are fp32 (the rotation fp64 for an fp64 x).
    """
    angle = positions.to(torch.float32)[:, None] * inv_freq
    sign = -1.0 if inverse else 1.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turn = torch.complex(angle.cos(), angle.sin().mul_(sign)).to(
        torch.complex128 if wide == torch.float64 else torch.complex64
    )
    turn = turn.view(x.shape[0], *(1,) * (x.ndim - 2), inv_freq.shape[0])
    pairs = x.to(wide, memory_format=torch.contiguous_format).unflatten(-1, (inv_freq.shape[0], 2))
    rotated = torch.view_as_complex(pairs) * turn
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)
