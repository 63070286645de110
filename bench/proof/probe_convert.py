"""Cases for bench/probes/convert.cu: packed conversions around every boundary (PTX ISA 9.7.9.22, cvt)."""

from __future__ import annotations

import numpy as np

from .probe_wgmma import E4M3, decode_table
from .probes import Array, Case

# Modes of convert.cu
TO_E4M3, TO_E4M3_PAIR, TO_BF16, TO_BF16_PAIR, FROM_E4M3, FROM_BF16 = range(6)
NEIGHBOURS = 4  # fp32 values on each side of a boundary


def boundary_patterns() -> Array:
    """fp32 bits at which a conversion can change its mind, and their neighbours; signs both.

    Every value of e4m3, every midpoint of two of them, every power of two, the ends of fp32's ranges,
    and for all 65536 upper halves the lower halves 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff (the ties of bf16).
    """
    points: list[float] = []
    table = decode_table(E4M3)
    values = np.unique(np.abs(table[np.isfinite(table)]))
    points += values.tolist()
    points += ((values[1:] + values[:-1]) / 2).tolist()
    points += [2.0**e for e in range(-149, 128)]
    points += [448.0, 464.0, 480.0, 3.4028234663852886e38]
    exact = np.unique(np.array(points, np.float64).astype(np.float32)).view(np.uint32).astype(np.int64)
    near = exact[:, None] + np.arange(-NEIGHBOURS, NEIGHBOURS + 1)
    near = near[(near >= 0) & (near < 1 << 31)]
    near = np.concatenate([near, near | 1 << 31])
    upper = np.arange(1 << 16, dtype=np.int64) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    result: Array = np.unique(np.concatenate([near, (upper[:, None] + lower).ravel()])).astype(np.uint32)
    return np.append(result, result[:1]) if result.size % 2 else result  # in pairs


def round_to_table(patterns: Array, table: Array, top: float) -> Array:
    """8-bit codes: nearest, ties to the even code, saturating; NaN -> 0x7F (cvt.rn.satfinite)."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        value = patterns.view(np.float32).astype(np.float64)
    positive = np.arange(128)[np.isfinite(table[:128])]  # codes ascend with values
    values = table[positive]
    magnitude = np.minimum(np.abs(np.nan_to_num(value, nan=0.0, posinf=top, neginf=top)), top)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    middle = (low + high) / 2  # exact in float64
    up = (magnitude > middle) | ((magnitude == middle) & (positive[above] % 2 == 0))
    codes = np.where(up, positive[above], positive[above - 1])
    codes = np.where(np.signbit(value), codes | 128, codes)
    result: Array = np.where(np.isnan(value), 0x7F, codes).astype(np.uint8)
    return result


def round_to_bf16(patterns: Array) -> Array:
    """Nearest even; NaN -> 0x7FFF (cvt.rn.bf16x2.f32)."""
    wide = patterns.astype(np.uint64)
    rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    result: Array = np.where(np.isnan(patterns.view(np.float32)), 0x7FFF, rounded).astype(np.uint16)
    return result


def convert() -> list[Case]:
    """fp32 to each format around its boundaries, singly and in pairs; every code of a format to fp32."""
    patterns = boundary_patterns()
    count = patterns.size
    e4m3, bf16 = round_to_table(patterns, decode_table(E4M3), 448.0), round_to_bf16(patterns)
    result = []
    for name, mode, expected in (
        ("to-e4m3", TO_E4M3, e4m3),
        ("to-e4m3-pair", TO_E4M3_PAIR, e4m3),
        ("to-bf16", TO_BF16, bf16),
        ("to-bf16-pair", TO_BF16_PAIR, bf16),
    ):
        result.append(
            Case(name, (mode, count), (patterns,), {"out": np.zeros_like(expected)}, {"out": expected})
        )
    e4m3_codes, bf16_codes = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
    out = {"out": np.zeros(256, np.float32)}  # which NaN comes out is for silicon to say
    result.append(Case("from-e4m3", (FROM_E4M3, 256), (e4m3_codes,), out))
    exact = (bf16_codes.astype(np.uint32) << 16).view(np.float32)
    out = {"out": np.zeros(65536, np.float32)}
    result.append(Case("from-bf16", (FROM_BF16, 65536), (bf16_codes,), out, {"out": exact}))
    return result
