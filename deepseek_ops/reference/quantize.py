"""FP8 quantisation: e4m3 values with one fp32 dequantisation multiplier per tile (report section 3.3.2).

The arithmetic here is the specification that kernels follow byte for byte: single IEEE fp32 operations, fp32
subnormals kept (a kernel must not be compiled with flush-to-zero), one rounding to nearest-even at the end.
The passes are chosen for speed on a CPU; comments name the ones that look odd for that reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import E4M3, ceil_div, round_up

TILE = 128
E4M3_LARGEST = 448.0
E4M3_FLOOR = 2.0**-118  # a smaller amax counts as this much, so that 448 / amax stays finite
OFFICIAL_FLOOR = 1e-4  # what the released inference code uses instead


def tile_scales(
    amax: Tensor, largest: float, floor: float, pow2: bool, official_clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale (for dequantisation) and multiplier (for quantisation) of tiles with absolute maxima `amax`.

    A tile that is all zero, or holds Inf or NaN, gets 1 for both.
    """
    # Device tensors, because torch divides by a Python number on CUDA (and divides a number by a tensor
    # everywhere) through a reciprocal: two roundings where the specification has one.
    top = torch.full_like(amax, largest)
    quantisable = amax < torch.inf  # false for NaN
    if official_clamp:
        floor = OFFICIAL_FLOOR  # applies to zero tiles too
    else:
        quantisable &= amax > 0
    amax = torch.where(quantisable, amax.clamp_min(floor), top)  # top / top is 1 in every rule below
    scale = torch.div(amax, top)
    if not pow2:
        return scale, torch.div(top, amax)
    # Smallest power of two that is not below scale. A subnormal scale has biased exponent 0 and becomes 2^-126;
    # 2^-e is then at most 2^126, so both stay normal numbers.
    exponent = ((scale.view(torch.int32) - 1) >> 23) + 1
    return (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)


def spans(length: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """The full tiles of an axis, then its short last tile: (elements, tile indices, (tiles, tile length)).

    Two views instead of one padded copy.
    """
    full, rest = divmod(length, TILE)
    if full:
        yield slice(0, full * TILE), slice(0, full), (full, TILE)
    if rest:
        yield slice(full * TILE, length), slice(full, full + 1), (1, rest)


def encode_e4m3(tiles: Tensor, multiplier: Tensor, amax: Tensor, out: Tensor) -> None:
    """out = e4m3(tiles * multiplier): nearest-even, saturating, NaN (sign kept) for Inf and NaN."""
    # Clamped first: torch's own conversion turns what is out of range into NaN or 448, depending on its version.
    out.copy_((tiles * multiplier).clamp_(-E4M3_LARGEST, E4M3_LARGEST))
    if not bool((amax < torch.inf).all()):
        nan = torch.signbit(tiles).to(torch.uint8) << 7 | 0x7F
        codes = out.view(torch.uint8)
        codes.copy_(torch.where(tiles.isfinite(), codes, nan))


def decode_e4m3(q: Tensor) -> Tensor:
    """The exact fp32 values of e4m3 codes; twelve times faster on a CPU than ``q.float()``."""
    codes = q.view(torch.int8)
    if codes.numel() and int((codes & 0x7F).amax()) == 0x7F:
        return q.float()  # NaN keeps its sign
    # Exponent and mantissa lie in a half's lowest exponent bits, subnormals included: the half is value / 256.
    half = codes.to(torch.int16)
    half <<= 7
    half &= ~0x4000  # the copy of the sign that sign extension left in the top exponent bit
    return half.view(torch.float16).float().mul_(256.0)


def amax_of(tiles: Tensor, dim: int) -> Tensor:
    return tiles.abs().amax(dim)


def new_row_scales(like: Tensor, rows: int, length: int) -> Tensor:
    """GEMM-ready scales of ``[rows, length]``: [tiles, rows padded to 4], rows contiguous, padding 1."""
    return like.new_ones((ceil_div(length, TILE), round_up(rows, 4)), dtype=torch.float32)


# 1 x 128 and 128 x 1


def quantize_1x128(x: Tensor, pow2: bool, official_clamp: bool) -> tuple[Tensor, Tensor]:
    rows, length = x.shape
    x = x.float()
    q = torch.empty((rows, length), dtype=E4M3, device=x.device)
    scale = new_row_scales(x, rows, length)
    for elements, tiles, shape in spans(length):
        x_tiles = x[:, elements].unflatten(1, shape)
        amax = amax_of(x_tiles, 2)
        tile_scale, multiplier = tile_scales(amax, E4M3_LARGEST, E4M3_FLOOR, pow2, official_clamp)
        scale[tiles, :rows] = tile_scale.t()
        encode_e4m3(x_tiles, multiplier[..., None], amax, q[:, elements].unflatten(1, shape))
    return q, scale


def quantize_128x1(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    tokens, channels = x.shape
    x = x.float()
    padded = round_up(tokens, TILE)
    q = torch.empty((padded, channels), dtype=E4M3, device=x.device)
    q.view(torch.uint8)[tokens:] = 0
    scale = new_row_scales(x, channels, padded)
    for elements, tiles, shape in spans(tokens):
        x_tiles = x[elements].unflatten(0, shape)
        amax = amax_of(x_tiles, 1)
        tile_scale, multiplier = tile_scales(amax, E4M3_LARGEST, E4M3_FLOOR, pow2)
        scale[tiles, :channels] = tile_scale
        encode_e4m3(x_tiles, multiplier[:, None], amax, q[elements].unflatten(0, shape))
    return transposed(q), scale


def transposed(q: Tensor) -> Tensor:
    """Contiguous copy of q with its last two axes exchanged (bytes move; fp8 copies are slower)."""
    return q.view(torch.uint8).mT.clone(memory_format=torch.contiguous_format).view(E4M3)


def padded_tokens(tokens: int, groups: int) -> int:
    """Most tokens that `groups` groups holding at most `tokens` in all can have once each is padded to 128.

    Tight: each of min(groups, tokens) groups starts a tile with its first token, and from then on 128 tokens
    more are needed for every further tile.
    """
    if groups == 0:
        return 0
    nonempty = torch.sym_min(tokens, groups)
    return TILE * (nonempty + (tokens - nonempty) // TILE)


def pad_groups(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Copy each group's rows to a start that is a multiple of 128, zeros between: (padded fp32, offsets)."""
    tokens, groups = x.shape[0], offsets.shape[0] - 1
    sizes = offsets.diff()
    padded_sizes = (sizes + (TILE - 1)) // TILE * TILE
    padded_offsets = torch.cat([torch.zeros_like(offsets[:1]), padded_sizes.cumsum(0, dtype=torch.int32)])
    padded = padded_tokens(tokens, groups)
    if padded == 0:
        return x.new_zeros((0, x.shape[1]), dtype=torch.float32), padded_offsets
    row = torch.arange(padded, dtype=torch.int32, device=x.device)
    group = torch.searchsorted(padded_offsets[1:], row, right=True).clamp_max_(groups - 1)
    within = row - padded_offsets[group]
    occupied = within < sizes[group]
    source = torch.where(occupied, offsets[group] + within, 0)
    rows = x.index_select(0, source).float()
    # AND with 0 or -1 clears a padding row whatever it holds, NaN included, ten times faster than masked_fill.
    rows.view(torch.int32).bitwise_and_(-occupied.to(torch.int32)[:, None])
    return rows, padded_offsets


def quantize_128x1_grouped(x: Tensor, offsets: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    padded, padded_offsets = pad_groups(x, offsets)
    return (*quantize_128x1(padded, pow2), padded_offsets)


def quantize_1x128_128x1(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.float()
    return (*quantize_1x128(x, pow2, False), *quantize_128x1(x, pow2))


def quantize_1x128_128x1_grouped(
    x: Tensor, offsets: Tensor, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*quantize_1x128(x, pow2, False), *quantize_128x1_grouped(x, offsets, pow2))


def requantize_128x1(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_128x1(dequantize_1x128(q, scale, torch.float32), True)


def requantize_128x1_grouped(q: Tensor, scale: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_128x1_grouped(dequantize_1x128(q, scale, torch.float32), offsets, True)


# 128 x 128


def rows_of_blocks(blocks: Tensor, rows: int) -> Tensor:
    """Repeat [..., row blocks, n] to one line per row, [..., rows, n]."""
    return blocks.repeat_interleave(TILE, -2)[..., :rows, :]


def quantize_128x128(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    *lead, rows, length = w.shape
    w = w.float()
    q = torch.empty(w.shape, dtype=E4M3, device=w.device)
    row_blocks = ceil_div(rows, TILE)
    scale = w.new_ones((*lead, row_blocks, ceil_div(length, TILE)))
    for elements, tiles, shape in spans(length):
        w_tiles = w[..., elements].unflatten(-1, shape)
        amax = amax_of(w_tiles, -1)  # of 1 x 128 tiles; only these few numbers are padded to whole blocks
        amax = F.pad(amax, (0, 0, 0, row_blocks * TILE - rows)).unflatten(-2, (row_blocks, TILE)).amax(-2)
        scale[..., tiles], multiplier = tile_scales(amax, E4M3_LARGEST, E4M3_FLOOR, pow2)
        multiplier = rows_of_blocks(multiplier, rows)[..., None]
        encode_e4m3(w_tiles, multiplier, amax, q[..., elements].unflatten(-1, shape))
    return q, scale


def transpose_128x128(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return transposed(q), scale.mT.clone(memory_format=torch.contiguous_format)


# Dequantisation


def dequantize_rows(q: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [..., rows, length] times row_scale [..., rows, tiles], each repeated over its tile; last step rounds."""
    exact = dtype == torch.float64  # the product of 4 by 24 bits needs no rounding in fp64
    values = decode_e4m3(q).to(dtype if exact else torch.float32)
    for elements, tiles, shape in spans(q.shape[-1]):
        values[..., elements].unflatten(-1, shape).mul_(row_scale[..., tiles, None])
    return values.to(dtype).contiguous()


def dequantize_1x128(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_rows(q, scale[:, : q.shape[0]].t(), dtype)


def dequantize_128x1(q_t: Tensor, scale: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    return dequantize_1x128(q_t, scale, dtype)[:, :tokens].t().contiguous()


def dequantize_128x128(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_rows(q, rows_of_blocks(scale, q.shape[-2]), dtype)
