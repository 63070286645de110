"""Rotary position embedding on interleaved pairs: the meaning of the op in pure PyTorch."""

from __future__ import annotations

import torch


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Rotate (x[2i], x[2i+1]) by the angle position * inv_freq[i], or by its negative.

    The angle is one fp32 product, its sine and cosine and the rotation are fp32 (the rotation fp64 for an fp64 x).
    """
    angle = positions[:, None] * inv_freq
    sine = angle.sin()
    turn = torch.complex(angle.cos_(), sine.neg_() if inverse else sine)
    wide = torch.float32
    if x.dtype == torch.float64:
        wide, turn = torch.float64, turn.to(torch.complex128)
    turn = turn.view(x.shape[0], *(1,) * (x.ndim - 2), inv_freq.shape[0])
    pairs = x.to(wide, memory_format=torch.contiguous_format).view(*x.shape[:-1], inv_freq.shape[0], 2)
    rotated = torch.view_as_complex(pairs) * turn
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)
