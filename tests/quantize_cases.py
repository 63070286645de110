"""Inputs and comparisons shared by the tests of the quantisers: special tiles, random tensors, oracle checks."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import torch

import deepseek_ops

from . import oracle_quantize as oracle

E4M3 = torch.float8_e4m3fn


def codes(q):
    return q.contiguous().view(torch.uint8).tolist()


def rows(x):
    return x.double().tolist()


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def on_reference(function):
    """For what a test needs besides its subject: ops without kernels, inputs that only cost time in the emulator."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with deepseek_ops.backend("reference"):
            return function(*args, **kwargs)

    return call


def neighbours(value):
    """value as fp32, and one ulp below and above."""
    value = np.float32(value)
    return [float(np.nextafter(value, np.float32(to))) for to in (0, math.inf)] + [float(value)]


def midpoints(first, last):
    """Values half-way between consecutive positive e4m3 codes first..last, and one fp32 ulp beside."""
    pairs = [(oracle.decode(c, oracle.E4M3), oracle.decode(c + 1, oracle.E4M3)) for c in range(first, last)]
    return [v for low, high in pairs for v in neighbours((low + high) / 2)]


def product_ties():
    """Tiles of (amax, x) whose fp32 product x * (448 / amax) is a tie between codes, though the exact one is not.

    The tie goes to even, against the exact value: they tell two roundings (the specification) from one.
    """
    rng = random.Random(1)
    found = []
    while len(found) < 8:
        amax = np.float32(rng.uniform(1, 2))
        multiplier = np.float32(448) / amax
        code = rng.randrange(0x20, 0x70)
        tie = np.float32((oracle.decode(code, oracle.E4M3) + oracle.decode(code + 1, oracle.E4M3)) / 2)
        x = tie / multiplier
        exact = float(x) * float(multiplier)  # exact in fp64
        if x * multiplier == tie and (exact > float(tie) if code % 2 == 0 else exact < float(tie)):
            found.append([float(amax), float(x), -float(x)])
    return found


def special_tiles():
    """Tiles of 128 values, each a known trap."""
    rng = random.Random(0)
    inf, nan = math.inf, math.nan
    tiles = {
        "zeros": [0.0],
        "negative_zeros": [-0.0],
        "mixed_zeros": [0.0, -0.0],
        "subnormals_in": [2.0**-149, -(2.0**-149), 2.0**-127, -(2.0**-126), 3 * 2.0**-140],
        "subnormals_in_normal_tile": [1.0, 2.0**-149, -(2.0**-130)],
        "underflow_to_signed_zero": [448.0, -(2.0**-10), 2.0**-10, -(2.0**-40), neighbours(2.0**-10)[1]],
        "largest_fp32": [3.4028234663852886e38, -1e38, 1e30, 0.0],
        "infinity": [inf, 1.0, -3.3, 500.0, -1e30, 0.0, -0.0],
        "minus_infinity": [1e-20, -inf, 460.0],
        "nan": [2.0, nan, 0.3],
        "minus_nan": [math.copysign(nan, -1.0), -449.0, 1e-9],
        "nan_and_infinity": [nan, inf, -inf, 7.7],
        "huge_range_in_tile": [1e30, 1e-30, -1.0, 3e29],
    }
    # amax 448 makes scale 1, so that these are the codes' own decision points
    points = midpoints(0, 0x7E)
    for start in range(0, len(points), 63):
        tiles[f"midpoints_{start}"] = [448.0] + [s * p for p in points[start : start + 63] for s in (1, -1)]
    for exponent in (-149, -130, -126, -118, -117, -9, 0, 9, 127):
        for value in neighbours(2.0**exponent):
            tiles[f"amax_{value!r}"] = [value, -value / 3, value / 100]
    for exponent in (-127, -126, -125, -118, -20, 0, 100, 119):  # where the power-of-two exponent steps
        for value in neighbours(448 * 2.0**exponent):
            tiles[f"amax_{value!r}"] = [-value, value / 3, value * 0.51]
    for i, values in enumerate(product_ties()):
        tiles[f"product_tie_{i}"] = values
    for i in range(6):
        tiles[f"random_{i}"] = [rng.gauss(0, 1) * 2.0 ** rng.randint(-12, 0) for _ in range(128)]
    fill = {name: values + [values[-1] * 0.37 if values[-1] else values[-1]] * (128 - len(values))
            for name, values in tiles.items()}  # fmt: skip
    return {name: torch.tensor(values, dtype=torch.float32).tolist() for name, values in fill.items()}


TILES = special_tiles()


def special_rows(columns):
    """All special tiles laid out in rows of `columns`; neighbours in a row have unlike ranges."""
    values = [v for tile in TILES.values() for v in tile]
    values += [0.5] * (-len(values) % columns)
    return torch.tensor(values, dtype=torch.float32).reshape(-1, columns)


def random_tensor(seed, *shape, dtype=torch.float32, spread=30):
    """Normal values; every 64 x 64 patch has its own magnitude within 2^-spread .. 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    patches = [max(1, -(-n // 64)) for n in shape]
    exponents = torch.randint(-spread, spread + 1, patches, generator=generator).float()
    for dim, n in enumerate(shape):
        exponents = exponents.repeat_interleave(64, dim).narrow(dim, 0, n)
    return (torch.randn(shape, generator=generator) * exponents.exp2()).to(dtype)


def strided(x):
    """The same values at every second column of a larger buffer, not 16-byte aligned."""
    buffer = torch.full((x.shape[0], 2 * x.shape[1] + 3), 7.0, dtype=x.dtype)
    view = buffer[:, 1 : 1 + 2 * x.shape[1] : 2]
    view.copy_(x)
    return view


def check_rows(x, q, scale, **options):
    want, scales = oracle.quantize_rows(rows(x), **options)
    tiles = -(-x.shape[1] // 128)
    assert q.dtype == E4M3 and q.shape == x.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    assert codes(q) == want
    assert scale.shape == (tiles, -(-x.shape[0] // 4) * 4)
    assert scale.tolist() == oracle.gemm_ready(scales, tiles)


def check_columns(x, q_t, scale, **options):
    """x [T, C] against q_t, its tail of tokens padded."""
    tokens, channels = x.shape
    want, scales = oracle.quantize_rows(oracle.transpose(rows(x), channels), **options)
    padding = -tokens % 128
    assert codes(q_t) == [line + [0] * padding for line in want]
    assert q_t.is_contiguous() and scale.is_contiguous()
    assert q_t.shape == (channels, tokens + padding)
    assert scale.tolist() == oracle.gemm_ready(scales, (tokens + padding) // 128)
    assert scale.shape == ((tokens + padding) // 128, -(-channels // 4) * 4)
