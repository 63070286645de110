"""E5M6, the 12-bit format for cached activations (report section 3.5.2): sign, 5 exponent bits, 6 mantissa bits.

A code is the top 12 bits of an IEEE half (exponent bias 15). The largest value used is 65024, the smallest
subnormal 2^-20. Every code of exponent 31 that `pack_e5m6` writes is the NaN 0x7FF, with sign.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import ceil_div
from .quantize import (
    amax_of,
    new_row_scales,
    quantize_128x1,
    quantize_128x1_grouped,
    spans,
    tile_scales,
)

E5M6_LARGEST = 65024.0
E5M6_FLOOR = 2.0**-111  # 65024 / 2^-111 lies in the binade of 448 / 2^-118, the last but one of fp32


def encode_e5m6(values: Tensor, multiplier: Tensor, amax: Tensor) -> Tensor:
    """int32 codes of values * multiplier: nearest-even from the fp32 product, saturating, NaN for Inf and NaN."""
    y = (values * multiplier).clamp_(-E5M6_LARGEST, E5M6_LARGEST)
    codes = y.view(torch.int32) >> 20 & 0x800  # the sign
    y.abs_()
    # The fp32 sum y + 2^(E+17) has exactly the mantissa bits that E5M6 keeps of a y in [2^E, 2^(E+1)), and of a
    # subnormal y with E = -14: the addition does the rounding, in hardware. What is left fits a half exactly.
    anchor = (
        (y.view(torch.int32) & 0x7F800000).clamp_min_((127 - 14) << 23).add_(17 << 23).view(torch.float32)
    )
    y.add_(anchor).sub_(anchor)
    codes |= y.half().view(torch.int16) >> 4
    if not bool((amax < torch.inf).all()):
        nan = torch.signbit(values).to(torch.int32) << 11 | 0x7FF
        codes = torch.where(values.isfinite(), codes, nan)
    return codes


def pack_words(codes: Tensor) -> Tensor:
    """int32 codes [T, 8n] -> uint8 [T, 12n]: eight codes in three little-endian words, first in the top bits."""
    tokens, length = codes.shape
    v = codes.unflatten(1, (length // 8, 8)).unbind(2)
    words = codes.new_empty((tokens, length // 8, 3))
    words[..., 0] = v[0] << 20 | v[1] << 8 | v[2] >> 4
    words[..., 1] = v[2] << 28 | v[3] << 16 | v[4] << 4 | v[5] >> 8
    words[..., 2] = v[5] << 24 | v[6] << 12 | v[7]
    return words.flatten(1).view(torch.uint8)


def unpack_words(packed: Tensor) -> Tensor:
    """The inverse of `pack_words`, as exact fp32 values [T, 8n]."""
    tokens, size = packed.shape
    if size == 0:
        return packed.new_empty((tokens, 0), dtype=torch.float32)
    aligned = packed.is_contiguous() and packed.storage_offset() % 4 == 0
    packed = packed if aligned else packed.clone(memory_format=torch.contiguous_format)
    w0, w1, w2 = packed.view(torch.int32).unflatten(1, (size // 12, 3)).unbind(2)
    half = torch.empty((tokens, size // 12, 8), dtype=torch.int16, device=packed.device)
    # Each code goes to the top 12 bits of 16; the conversion to int16 drops what lies above.
    half[..., 0] = w0 >> 16 & -16
    half[..., 1] = w0 >> 4 & -16
    half[..., 2] = w0 << 8 | (w1 >> 24 & 0xF0)
    half[..., 3] = w1 >> 12 & -16
    half[..., 4] = w1 & -16
    half[..., 5] = w1 << 12 | (w2 >> 20 & 0xFF0)
    half[..., 6] = w2 >> 8 & -16
    half[..., 7] = w2 << 4
    return half.flatten(1).view(torch.float16).float()


def pack_e5m6(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    x = x.float()
    codes = torch.empty((tokens, ceil_div(hidden, 8) * 8), dtype=torch.int32, device=x.device)
    codes[:, hidden:] = 0
    if granularity == "row":
        amax = amax_of(F.pad(x, (0, 1)) if hidden == 0 else x, 1)
        scale, multiplier = tile_scales(amax, E5M6_LARGEST, E5M6_FLOOR, False)
        codes[:, :hidden] = encode_e5m6(x, multiplier[:, None], amax)
        return pack_words(codes), scale
    scale = new_row_scales(x, tokens, hidden)
    for elements, tiles, shape in spans(hidden):
        x_tiles = x[:, elements].unflatten(1, shape)
        amax = amax_of(x_tiles, 2)
        tile_scale, multiplier = tile_scales(amax, E5M6_LARGEST, E5M6_FLOOR, True)
        scale[tiles, :tokens] = tile_scale.t()
        codes[:, elements] = encode_e5m6(x_tiles, multiplier[..., None], amax).flatten(1)
    return pack_words(codes), scale


def unpack_e5m6(packed: Tensor, scale: Tensor, hidden: int, granularity: str, dtype: torch.dtype) -> Tensor:
    tokens = packed.shape[0]
    values = unpack_words(packed)[:, :hidden]
    if granularity == "row":
        return values.mul_(scale[:, None]).to(dtype).contiguous()
    for elements, tiles, shape in spans(hidden):
        values[:, elements].unflatten(1, shape).mul_(scale[tiles, :tokens].t()[..., None])
    return values.to(dtype).contiguous()


def requantize_e5m6_128x1(packed: Tensor, scale: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    return quantize_128x1(unpack_e5m6(packed, scale, hidden, "tile", torch.float32), True)


def requantize_e5m6_128x1_grouped(
    packed: Tensor, scale: Tensor, hidden: int, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values = unpack_e5m6(packed, scale, hidden, "tile", torch.float32)
    return quantize_128x1_grouped(values, offsets, True)
