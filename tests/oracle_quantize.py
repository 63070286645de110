"""A scalar oracle of the quantisers: exact rational arithmetic on Python numbers, no torch, no fp8 conversion.

Slow and literal on purpose. A tensor is a list of rows of Python floats (which hold bf16 and fp32 exactly).
"""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction
from typing import NamedTuple

TILE = 128
OFFICIAL_FLOOR = struct.unpack("<f", struct.pack("<f", 1e-4))[0]

Row = list[float]


class Format(NamedTuple):
    exponent_bits: int
    mantissa_bits: int
    largest: int
    floor: Fraction  # least amax
    nan: int  # code, without sign

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1


E4M3 = Format(4, 3, 448, Fraction(1, 2**118), 0x7F)
E5M6 = Format(5, 6, 65024, Fraction(1, 2**111), 0x7FF)


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if value >= Fraction(2) ** exponent else exponent - 1


def round_binary(value: Fraction, mantissa_bits: int, least_exponent: int) -> Fraction:
    """Nearest binary floating-point number to value >= 0, ties to even, exponent unbounded above."""
    if value == 0:
        return value
    unit = max(floor_log2(value), least_exponent) - mantissa_bits  # log2 of the last place
    numerator = value.numerator << max(-unit, 0)
    denominator = value.denominator << max(unit, 0)
    count, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and count % 2):
        count += 1
    return Fraction(count << max(unit, 0), 1 << max(-unit, 0))


def fp32(value: Fraction) -> Fraction:
    return round_binary(value, 23, -126)


def encode(magnitude: Fraction, fmt: Format) -> int:
    """Code (without sign) of the nearest value, saturating."""
    least = 1 - fmt.bias
    value = min(round_binary(magnitude, fmt.mantissa_bits, least), Fraction(fmt.largest))
    if value == 0:
        return 0
    exponent = max(floor_log2(value), least)
    units = value / Fraction(2) ** (exponent - fmt.mantissa_bits)  # below 2^mantissa_bits for a subnormal
    assert units.denominator == 1
    return ((exponent - least) << fmt.mantissa_bits) + int(units)


def decode(code: int, fmt: Format) -> float:
    """Value of a code with sign."""
    width = fmt.exponent_bits + fmt.mantissa_bits
    sign = -1.0 if code >> width else 1.0
    code &= 2**width - 1
    if code == fmt.nan:
        return math.copysign(math.nan, sign)
    exponent, mantissa = (
        code >> fmt.mantissa_bits,
        Fraction(code % 2**fmt.mantissa_bits, 2**fmt.mantissa_bits),
    )
    value = mantissa * Fraction(2) ** (1 - fmt.bias)
    if exponent:
        value = (1 + mantissa) * Fraction(2) ** (exponent - fmt.bias)
    return sign * float(value)


def scales(values: Row, fmt: Format, *, pow2: bool, official: bool = False) -> tuple[Fraction, Fraction]:
    """(scale, multiplier) of one tile."""
    one = Fraction(1)
    if not all(map(math.isfinite, values)):
        return one, one
    amax = max((abs(Fraction(v)) for v in values), default=Fraction(0))
    if official:
        amax = max(amax, Fraction(OFFICIAL_FLOOR))
    elif amax == 0:
        return one, one
    else:
        amax = max(amax, fmt.floor)
    scale = fp32(amax / fmt.largest)
    if not pow2:
        return scale, fp32(fmt.largest / amax)
    exponent = floor_log2(scale)
    if Fraction(2) ** exponent < scale:
        exponent += 1
    scale = Fraction(2) ** max(exponent, -126)
    return scale, 1 / scale


def code_of(value: float, multiplier: Fraction, fmt: Format) -> int:
    sign = (math.copysign(1.0, value) < 0) << (fmt.exponent_bits + fmt.mantissa_bits)
    if not math.isfinite(value):
        return sign | fmt.nan
    return sign | encode(fp32(abs(Fraction(value)) * multiplier), fmt)


def tiles_of(length: int) -> list[range]:
    return [range(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def quantize_rows(
    x: list[Row], fmt: Format = E4M3, *, pow2: bool = False, official: bool = False
) -> tuple[list[list[int]], list[Row]]:
    """1 x 128 tiles: (codes per row, scales per row)."""
    codes, row_scales = [], []
    for row in x:
        row_codes: list[int] = []
        scale_line = []
        for tile in tiles_of(len(row)):
            values = [row[i] for i in tile]
            scale, multiplier = scales(values, fmt, pow2=pow2, official=official)
            scale_line.append(float(scale))
            row_codes += [code_of(v, multiplier, fmt) for v in values]
        codes.append(row_codes)
        row_scales.append(scale_line)
    return codes, row_scales


def gemm_ready(row_scales: list[Row], tiles: int) -> list[Row]:
    """[rows][tiles] -> [tiles][rows padded to 4], padding 1."""
    padding = [1.0] * (-len(row_scales) % 4)
    return [[line[tile] for line in row_scales] + padding for tile in range(tiles)]


def transpose(x: list[Row], columns: int) -> list[Row]:
    return [[row[c] for row in x] for c in range(columns)]


def pad_groups(x: list[Row], columns: int, offsets: list[int], padded: int) -> tuple[list[Row], list[int]]:
    """Rows of each group, then zero rows up to a multiple of 128; `padded` rows in all."""
    out: list[Row] = []
    padded_offsets = [0]
    for begin, end in itertools.pairwise(offsets):
        out += x[begin:end]
        out += [[0.0] * columns] * (-len(out) % TILE)
        padded_offsets.append(len(out))
    assert len(out) <= padded
    return out + [[0.0] * columns] * (padded - len(out)), padded_offsets


def quantize_blocks(w: list[Row], columns: int, *, pow2: bool) -> tuple[list[list[int]], list[Row]]:
    """128 x 128 blocks: (codes per row, scales per block row)."""
    codes = [[0] * columns for _ in w]
    block_scales = []
    for rows in tiles_of(len(w)):
        line = []
        for tile in tiles_of(columns):
            values = [w[r][c] for r in rows for c in tile]
            scale, multiplier = scales(values, E4M3, pow2=pow2)
            line.append(float(scale))
            for r in rows:
                for c in tile:
                    codes[r][c] = code_of(w[r][c], multiplier, E4M3)
        block_scales.append(line)
    return codes, block_scales


def pack_words(codes: list[int]) -> list[int]:
    """Bytes of one row of 12-bit codes: 8 codes are one 96-bit number, cut in three little-endian words."""
    out: list[int] = []
    padded = codes + [0] * (-len(codes) % 8)
    for start in range(0, len(padded), 8):
        number = 0
        for code in padded[start : start + 8]:
            number = number << 12 | code
        words = (number >> 64, number >> 32 & 0xFFFFFFFF, number & 0xFFFFFFFF)
        out += struct.pack("<III", *words)
    return out
