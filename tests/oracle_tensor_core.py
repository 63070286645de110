"""The tensor-core step in Python integers and fractions, one output at a time.

Written from the description in `deepseek_ops/reference/tensor_core.py`, sharing no code with it: operands are
decoded from their bits, alignment and truncation are integer shifts, sums are Python integers. Slow and obvious.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

CANONICAL_NAN = 0x7FFFFFFF
INFINITY = 0x7F800000


def float32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


class Number:
    """A decoded floating-point number: significand * 2^(exponent - fraction), or NaN or infinity."""

    def __init__(self, bits: int, exponent_bits: int, fraction: int, ieee: bool) -> None:
        bias = (1 << (exponent_bits - 1)) - 1
        self.negative = bool(bits >> (exponent_bits + fraction))
        field = (bits >> fraction) & ((1 << exponent_bits) - 1)
        tail = bits & ((1 << fraction) - 1)
        top = field == (1 << exponent_bits) - 1
        self.infinite = ieee and top and tail == 0
        self.nan = top and (tail != 0 if ieee else tail == (1 << fraction) - 1)
        self.fraction = fraction
        self.exponent = max(field, 1) - bias  # subnormals keep the smallest exponent
        self.significand = (tail | (1 << fraction if field else 0)) * (-1 if self.negative else 1)


def e4m3(bits: int) -> Number:
    return Number(bits, 4, 3, ieee=False)


def bf16(bits: int) -> Number:
    return Number(bits, 8, 7, ieee=True)


def fp32(bits: int) -> Number:
    return Number(bits, 8, 23, ieee=True)


def toward_zero(numerator: int, shift: int) -> int:
    """numerator * 2^shift without the fraction."""
    size = abs(numerator) << shift if shift >= 0 else abs(numerator) >> -shift
    return -size if numerator < 0 else size


def step(a: list[Number], b: list[Number], c_bits: int, fraction_bits: int, mantissa_bits: int) -> int:
    """fp32 bits of one wgmma step c + sum(a * b) for one output."""
    c = fp32(c_bits)
    plus = minus = False
    for x, y in zip(a, b, strict=True):
        zero_times_infinity = (x.infinite and y.significand == 0) or (y.infinite and x.significand == 0)
        if x.nan or y.nan or zero_times_infinity:
            return CANONICAL_NAN
        if x.infinite or y.infinite:
            plus |= x.negative == y.negative
            minus |= x.negative != y.negative
    if c.nan:
        return CANONICAL_NAN
    if c.infinite:
        plus |= not c.negative
        minus |= c.negative
    if plus and minus:
        return CANONICAL_NAN
    if plus or minus:
        return INFINITY | (int(minus) << 31)

    # (integer, exponent, fraction bits the integer carries)
    terms = [
        (x.significand * y.significand, x.exponent + y.exponent, x.fraction + y.fraction)
        for x, y in zip(a, b, strict=True)
    ]
    terms.append((c.significand, c.exponent, c.fraction))
    terms = [term for term in terms if term[0] != 0]
    if not terms:
        return 0
    largest = max(exponent for _, exponent, _ in terms)
    total = sum(
        toward_zero(value, fraction_bits - carried - (largest - exponent))
        for value, exponent, carried in terms
    )
    return encode_toward_zero(total, largest - fraction_bits, mantissa_bits)


def encode_toward_zero(total: int, power: int, mantissa_bits: int) -> int:
    """fp32 bits of total * 2^power, cut to `mantissa_bits` below the leading bit (or below 2^-126)."""
    if total == 0:
        return 0
    sign = (1 << 31) if total < 0 else 0
    size = abs(total)
    exponent = size.bit_length() - 1 + power
    if exponent > 127:
        return sign | INFINITY
    exponent = max(exponent, -126)
    mantissa = toward_zero(size, power - (exponent - mantissa_bits)) << (23 - mantissa_bits)
    if mantissa >> 23:
        return sign | (exponent + 127) << 23 | (mantissa & 0x7FFFFF)
    return sign | mantissa if mantissa else 0


def round_to_float32(x: Fraction) -> int:
    """fp32 bits of an exact value, to nearest, ties to even; a zero is +0."""
    if x == 0:
        return 0
    sign, x = ((1 << 31), -x) if x < 0 else (0, x)
    exponent = max(floor_log2(x), -126)
    scaled = x / Fraction(2) ** (exponent - 23)
    units, rest = divmod(scaled.numerator, scaled.denominator)
    half = Fraction(rest, scaled.denominator)
    if half > Fraction(1, 2) or (half == Fraction(1, 2) and units & 1):
        units += 1
    # An integer in units of the last place, so that a carry into the exponent adds up by itself.
    bits = units + ((exponent + 126) << 23)
    return sign | min(bits, INFINITY)


def floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def fma(x: float, y: float, z: float) -> int:
    """fp32 bits of x * y + z for finite fp32 values, one rounding. The sign of an exact zero is not modelled."""
    assert all(map(math.isfinite, (x, y, z)))
    return round_to_float32(Fraction(x) * Fraction(y) + Fraction(z))
