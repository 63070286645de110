"""E5M6: every code, every decision point of the rounding, the bit order in memory, and scales of both kinds."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops import quantize as quant
from deepseek_ops._registry import OPS

from . import oracle_quantize as oracle
from .quantize_cases import check_columns, i32, random_tensor, special_rows, strided

GRANULARITY = pytest.mark.parametrize("granularity", ["tile", "row"])
LARGEST = 65024.0


def oracle_pack(x, granularity):
    """(bytes per row, scale in its public layout)."""
    values = x.double().tolist()
    if granularity == "row":
        packed, scale = [], []
        for row in values:
            row_scale, multiplier = oracle.scales(row, oracle.E5M6, pow2=False)
            packed.append(oracle.pack_words([oracle.code_of(v, multiplier, oracle.E5M6) for v in row]))
            scale.append(float(row_scale))
        return packed, scale
    codes, scales = oracle.quantize_rows(values, oracle.E5M6, pow2=True)
    return [oracle.pack_words(line) for line in codes], oracle.gemm_ready(scales, -(-x.shape[1] // 128))


def check(x, granularity):
    packed, scale = quant.pack_e5m6(x, granularity=granularity)
    want, want_scale = oracle_pack(x, granularity)
    assert packed.dtype == torch.uint8 and packed.is_contiguous() and scale.is_contiguous()
    assert packed.shape == (x.shape[0], -(-x.shape[1] // 8) * 12)
    assert packed.tolist() == want
    assert scale.dtype == torch.float32 and scale.tolist() == want_scale
    return packed, scale


def packed_codes(codes):
    """A packed row of given 12-bit codes."""
    return torch.tensor([oracle.pack_words(codes)], dtype=torch.uint8)


@GRANULARITY
def test_special_tiles(granularity, backend_name):
    check(special_rows(384), granularity)
    check(special_rows(128), granularity)


@GRANULARITY
@given(
    shape=st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 7, 8, 100, 128, 129, 256, 300])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    make=st.sampled_from([lambda x: x, strided, lambda x: x.t().contiguous().t()]),
    seed=st.integers(0, 99),
)
def test_random_tensors(granularity, shape, dtype, make, seed, backend_name):
    check(make(random_tensor(seed, *shape, dtype=dtype)), granularity)


@GRANULARITY
def test_rounding_at_every_decision_point(granularity, backend_name):
    """The middle of every two neighbouring codes (subnormals included), one ulp beside, at scale 1, both signs."""
    finite = [oracle.decode(code, oracle.E5M6) for code in range(0x7C0)]
    assert finite[0x7BF] == LARGEST
    middles = np.array([(a + b) / 2 for a, b in itertools.pairwise(finite)], dtype=np.float32)
    points = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))]
    )
    points = np.concatenate([points, -points, np.array([2.0**-21, 2.0**-149, -(2.0**-22)], dtype=np.float32)])
    points = np.append(points, [0.0] * (-len(points) % 127)).astype(np.float32).reshape(-1, 127)
    x = torch.from_numpy(np.concatenate([np.full((len(points), 1), LARGEST, np.float32), points], axis=1))
    _, scale = check(x, granularity)
    assert (scale == 1).all()


def test_every_code_unpacks_and_packs_again(backend_name):
    codes = [code for code in range(4096) if code & 0x7FF < 0x7C0]
    packed = packed_codes(codes)
    tiles = len(codes) // 128
    values = quant.unpack_e5m6(packed, torch.ones(tiles, 4), len(codes), dtype=torch.float32)
    assert [struct.pack("<d", v) for v in values[0].tolist()] == [
        struct.pack("<d", oracle.decode(code, oracle.E5M6)) for code in codes
    ]
    again, scale = quant.pack_e5m6(values, granularity="row")  # its greatest value gives scale 1
    assert scale.tolist() == [1.0]
    assert torch.equal(again, packed)


def test_first_value_is_in_the_most_significant_bits_of_little_endian_words(backend_name):
    codes = [0x123, 0x456, 0x789, 0xABC, 0xDEF, 0x012, 0x345, 0x678]
    # words 0x12345678 0x9ABCDEF0 0x12345678
    assert oracle.pack_words(codes) == [*bytes.fromhex("78563412 F0DEBC9A 78563412")]
    # the same through the op: codes of scale 1 with exponent below 31
    codes = [0x001, 0x802, 0x7BF, 0x040, 0x3C0, 0xBC1, 0x5FF, 0xFBF]
    values = torch.tensor([[oracle.decode(code, oracle.E5M6) for code in codes]])
    packed, scale = quant.pack_e5m6(values)
    assert scale[0, 0] == 1.0
    assert packed.tolist() == [oracle.pack_words(codes)]
    words = struct.unpack("<III", bytes(packed[0].tolist()))
    assert words[0] == 0x001 << 20 | 0x802 << 8 | 0x7B and words[2] == 0xC1 << 24 | 0x5FF << 12 | 0xFBF


@GRANULARITY
@pytest.mark.parametrize("hidden", [0, 5, 128, 300])
def test_unpacked_values(granularity, hidden, backend_name):
    x = random_tensor(3, 6, hidden)
    packed, scale = quant.pack_e5m6(x, granularity=granularity)
    codes, _ = oracle.quantize_rows(x.double().tolist(), oracle.E5M6, pow2=True)
    for dtype in (torch.float32, torch.bfloat16):
        got = quant.unpack_e5m6(packed, scale, hidden, granularity=granularity, dtype=dtype)
        assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
        if granularity == "tile":
            values = torch.tensor([[oracle.decode(c, oracle.E5M6) for c in line] for line in codes]).reshape(
                6, hidden
            )
            per_value = scale.t()[:6].repeat_interleave(128, 1)[:, :hidden]
            assert torch.equal(got, (values * per_value).to(dtype))
        held = got.double()
        # half a unit is 2^-7 of the binade's start; bf16 adds 2^-9, fp32 scales next to nothing
        amax = x.double().abs().amax(1, keepdim=True) if hidden else held
        smallest = amax * 2.0**-21 * 2.0**-15  # half the smallest subnormal, 2^-20, at scale 2 amax / 65024
        relative = 2.0**-7 * (1 + 2.0**-14) + (2.0**-9 * 1.01 if dtype == torch.bfloat16 else 0)
        assert ((held - x.double()).abs() <= x.double().abs() * relative + smallest * 1.01).all()


def test_special_values_come_back(backend_name):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 70000.0, -1.0, -0.0, 2.0**-21, 2.0**-20]])
    for granularity in ("tile", "row"):
        packed, scale = quant.pack_e5m6(x, granularity=granularity)
        assert scale.flatten()[0] == 1.0
        got = quant.unpack_e5m6(packed, scale, 8, granularity=granularity, dtype=torch.float32)[0]
        assert got[:3].isnan().all() and got[3:].tolist() == [LARGEST, -1.0, 0.0, 0.0, 2.0**-20]
        assert torch.signbit(got[5]) and torch.signbit(got[1]) and not torch.signbit(got[0])


@given(seed=st.integers(0, 999))
def test_powers_of_two_never_move_a_value_again(seed, backend_name):
    x = random_tensor(seed, 3, 200)
    values = quant.unpack_e5m6(*quant.pack_e5m6(x), 200, dtype=torch.float32)
    assert torch.equal(quant.unpack_e5m6(*quant.pack_e5m6(values), 200, dtype=torch.float32), values)


@GRANULARITY
def test_rounding_has_no_direction(granularity, backend_name):
    x = torch.rand(128, 1024, generator=torch.Generator().manual_seed(13)) * 2 - 1
    packed, scale = quant.pack_e5m6(x, granularity=granularity)
    got = quant.unpack_e5m6(packed, scale, 1024, granularity=granularity, dtype=torch.float32)
    error = (got.double() - x.double()) * x.sign().double()
    moved = (error != 0).sum()
    assert abs((error < 0).sum() / moved - 0.5) < 10 / moved**0.5
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5


def test_cached_tile_becomes_the_backward_operand(backend_name):
    """Section 3.5.2: a 1 x 128 E5M6 tile is turned into a 128 x 1 e4m3 tile in the backward pass."""
    x = random_tensor(5, 130, 7, spread=2)
    packed, packed_scale = quant.pack_e5m6(x)
    q_t, scale = quant.requantize_e5m6_128x1(packed, packed_scale, 7)
    cached = quant.unpack_e5m6(packed, packed_scale, 7, dtype=torch.float32)
    check_columns(cached, q_t, scale, pow2=True)
    error = (quant.dequantize_128x1(q_t, scale, 130) - x).abs()
    assert (error <= x.abs() * (2.0**-4 + 2.0**-7 + 2.0**-11) + x.abs().amax() * 2.0**-17).all()


@given(
    sizes=st.lists(st.sampled_from([0, 1, 127, 130]), min_size=0, max_size=3),
    first=st.sampled_from([0, 5]),
    rest=st.sampled_from([0, 3]),
    hidden=st.sampled_from([0, 1, 8, 16, 130]),
    seed=st.integers(0, 99),
)
def test_turning_equals_unpacking_and_quantising(sizes, first, rest, hidden, seed, backend_name):
    offsets = np.cumsum([first, *sizes])
    x = random_tensor(seed, int(offsets[-1]) + rest, hidden, spread=8)
    packed, scale = quant.pack_e5m6(x)
    cached = quant.unpack_e5m6(packed, scale, hidden, dtype=torch.float32)
    for group in (None, i32(offsets.tolist())):
        got = quant.requantize_e5m6_128x1(packed, scale, hidden, offsets=group)
        want = quant.quantize_128x1(cached, pow2=True, offsets=group)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.is_contiguous()
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_turning_rounds_only_what_underflows_or_has_more_bits(backend_name):
    """Every E5M6 value of 3 mantissa bits that its new tile can hold is kept exactly."""
    kept = torch.tensor([m / 8 * 2.0**e for e in range(-4, 4) for m in range(8, 16)])
    x = torch.cat([kept, -kept]).repeat(2, 1)
    packed, scale = quant.pack_e5m6(x)
    q_t, scale_t = quant.requantize_e5m6_128x1(packed, scale, x.shape[1])
    assert torch.equal(quant.dequantize_128x1(q_t, scale_t, 2), x)


def test_turning_keeps_nan_in_its_tile(backend_name):
    x = random_tensor(1, 200, 256, spread=2)
    clean = quant.requantize_e5m6_128x1(*quant.pack_e5m6(x), 256)
    x[150, 200] = -math.nan
    packed, scale = quant.pack_e5m6(x)
    q_t, scale_t = quant.requantize_e5m6_128x1(packed, scale, 256)
    codes = q_t.view(torch.uint8)
    assert codes[200, 150] == 0xFF and scale_t[1, 200] == 1.0 and q_t.float().isnan().sum() == 1
    # The 1 x 128 tile of row 150 was packed with scale 1, so that its other columns hold saturated or tiny values.
    outside = torch.ones(256, 256, dtype=torch.bool)
    outside[128:256, 128:256] = False
    assert torch.equal(codes[outside], clean[0].view(torch.uint8)[outside])


def test_unpacking_from_an_unaligned_view(backend_name):
    x = random_tensor(9, 4, 128)
    packed, scale = quant.pack_e5m6(x)
    buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    view = buffer[1:].view_as(packed)
    view.copy_(packed)
    assert torch.equal(quant.unpack_e5m6(view, scale, 128), quant.unpack_e5m6(packed, scale, 128))
    wide = torch.stack([packed, packed + 1], 2)[..., 0]
    assert torch.equal(quant.unpack_e5m6(wide, scale, 128), quant.unpack_e5m6(packed, scale, 128))


@GRANULARITY
def test_opcheck(granularity, backend_name):
    x = torch.randn(5, 260)
    packed, scale = quant.pack_e5m6(x, granularity=granularity)
    torch.library.opcheck(OPS["pack_e5m6"].raw, (x, granularity))
    torch.library.opcheck(OPS["pack_e5m6"].raw, (x[:, :5].bfloat16(), granularity))
    torch.library.opcheck(OPS["unpack_e5m6"].raw, (packed, scale, 260, granularity, torch.bfloat16))
    torch.library.opcheck(OPS["unpack_e5m6"].raw, (packed, scale, 260, granularity, torch.float32))


def test_compiles_without_a_graph_break(backend_name):
    def cached(x, weight):
        packed, scale = quant.pack_e5m6(x, granularity="row")
        return (quant.unpack_e5m6(packed, scale, x.shape[1], granularity="row", dtype=x.dtype) * weight).sum()

    x, weight = torch.randn(3, 20), torch.randn(20, requires_grad=True)
    compiled = torch.compile(cached, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(cached(x, weight), weight)[0]
    assert torch.equal(torch.autograd.grad(compiled(x, weight), weight)[0], expected)


X = torch.ones(4, 256)
PACKED, SCALE = torch.zeros(4, 384, dtype=torch.uint8), torch.ones(2, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quant.pack_e5m6(X.double()), "x: must be bfloat16 or float32; got float64"),
        (lambda: quant.pack_e5m6(X[0]), "x: must have 2 dimension"),
        (lambda: quant.pack_e5m6(X, granularity="block"), "granularity: must be one of 'tile', 'row'; got 'block'"),
        (lambda: quant.unpack_e5m6(X, SCALE, 256), "packed: must be uint8; got float32"),
        (lambda: quant.unpack_e5m6(PACKED[0], SCALE, 256), "packed: must have 2 dimension"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE, 257), r"packed: must have ceil.*396 for hidden 257; got shape \(4, 384\)"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE, -1), "hidden: must not be negative; got -1"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE[:1], 256), r"scale: must have shape \[2, 4\]"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE, 256, granularity="row"), r"scale: must have shape \[4\]"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE, 256, granularity="all"), "granularity: must be one of"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE, 256, dtype=torch.float64), "dtype: must be one of"),
        (lambda: quant.unpack_e5m6(PACKED, SCALE.double(), 256), "scale: must be float32"),
        (lambda: quant.requantize_e5m6_128x1(X, SCALE, 256), "packed: must be uint8; got float32"),
        (lambda: quant.requantize_e5m6_128x1(PACKED, SCALE, 257), "packed: must have ceil"),
        (lambda: quant.requantize_e5m6_128x1(PACKED, SCALE[:1], 256), r"scale: must have shape \[2, 4\]"),
        (lambda: quant.requantize_e5m6_128x1(PACKED, SCALE, 256, offsets=i32([])), "offsets: must have one element more"),
    ],
)  # fmt: skip
def test_argument_errors_name_argument_rule_and_value(call, message, backend_name):
    with pytest.raises(ArgumentError, match=message):
        call()
