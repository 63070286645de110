"""Byte-exact tests of the FP8 quantisers against the scalar oracle."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import quantize as quant

from . import oracle_quantize as oracle
from .quantize_cases import check_columns, check_rows, codes, i32, random_tensor, rows, special_rows, strided

POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["fp32_scale", "pow2_scale"])


@POW2
@pytest.mark.parametrize("official", [False, True], ids=["", "official"])
def test_rows_of_special_tiles(pow2, official, backend_name):
    x = special_rows(384)
    q, scale = quant.quantize_1x128(x, pow2=pow2, official_clamp=official)
    check_rows(x, q, scale, pow2=pow2, official=official)


@POW2
def test_columns_of_special_tiles(pow2, backend_name):
    x = special_rows(128).t()  # non-contiguous: tokens are the special axis
    check_columns(x, *quant.quantize_128x1(x, pow2=pow2), pow2=pow2)


@POW2
@given(
    shape=st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 100, 127, 128, 129, 256, 300])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    make=st.sampled_from([lambda x: x, strided]),
    seed=st.integers(0, 99),
)
def test_rows_and_columns_of_random_tensors(pow2, shape, dtype, make, seed, backend_name):
    x = make(random_tensor(seed, *shape, dtype=dtype))
    check_rows(x, *quant.quantize_1x128(x, pow2=pow2), pow2=pow2)
    x = make(x.t())
    check_columns(x, *quant.quantize_128x1(x, pow2=pow2), pow2=pow2)
    q, scale, q_t, scale_t = quant.quantize_1x128_128x1(x, pow2=pow2)
    check_rows(x, q, scale, pow2=pow2)
    check_columns(x, q_t, scale_t, pow2=pow2)


@POW2
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 127, 128, 129, 200]), min_size=0, max_size=4),
    first=st.sampled_from([0, 0, 5]),
    rest=st.sampled_from([0, 1, 140]),
    channels=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_groups(pow2, sizes, first, rest, channels, seed, backend_name):
    offsets = np.cumsum([first, *sizes]).tolist()
    x = random_tensor(seed, offsets[-1] + rest, channels)
    x[offsets[-1] :] = math.nan  # tokens of no group must not matter, nor those that padding happens to read
    x[: offsets[0]] = math.nan
    padded = quant.padded_tokens(x.shape[0], len(sizes))
    dense, padded_offsets = oracle.pad_groups(rows(x), channels, offsets, padded)
    want, scales = oracle.quantize_rows(oracle.transpose(dense, channels), pow2=pow2)

    q_t, scale, got_offsets = quant.quantize_128x1(x, pow2=pow2, offsets=i32(offsets))
    assert q_t.shape == (channels, padded) and q_t.is_contiguous()
    assert codes(q_t) == want
    assert scale.shape == (padded // 128, -(-channels // 4) * 4)
    assert scale.tolist() == oracle.gemm_ready(scales, padded // 128)
    assert got_offsets.dtype == torch.int32 and got_offsets.tolist() == padded_offsets

    both = quant.quantize_1x128_128x1(x, pow2=pow2, offsets=i32(offsets))
    check_rows(x, *both[:2], pow2=pow2)
    for got, expected in zip(both[2:], (q_t, scale, got_offsets), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_nan_in_the_first_token_stays_out_of_padding(backend_name):
    x = torch.ones(3, 2)
    x[0] = math.nan
    q_t, scale, _ = quant.quantize_128x1(x, offsets=i32([0, 1, 3]))
    assert codes(q_t)[0][:3] == [0x7F, 0, 0] and set(codes(q_t)[0][1:128]) == {0}
    assert codes(q_t)[0][128:131] == [0x7E, 0x7E, 0]
    assert scale[0, :2].tolist() == [1.0, 1.0] and scale[1, 0] == np.float32(1) / np.float32(448)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 127, 128, 129, 130, 255, 256, 257, 300])
def test_padded_tokens_is_the_smallest_bound(tokens):
    most = {0: 0}  # tokens used -> most tiles, over all ways of filling the groups so far
    for groups in range(1, 5):
        grown: dict[int, int] = {}
        for used, tiles in most.items():
            for size in range(tokens - used + 1):
                grown[used + size] = max(grown.get(used + size, 0), tiles + -(-size // 128))
        most = grown
        assert quant.padded_tokens(tokens, groups) == 128 * max(most.values())
    assert quant.padded_tokens(tokens, 0) == 0


@functools.cache
def wanted_blocks(shape, dtype, pow2):
    """The oracle takes longer than any backend."""
    w = random_tensor(3, *shape, dtype=dtype)
    return [
        oracle.quantize_blocks(rows(w_g), shape[-1], pow2=pow2) for w_g in (w if w.ndim == 3 else w[None])
    ]


@POW2
@pytest.mark.parametrize(
    "shape",
    [(0, 5), (5, 0), (1, 1), (127, 130), (128, 128), (130, 257), (576, 160), (2, 130, 129), (0, 3, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(pow2, shape, dtype, backend_name):
    w = random_tensor(3, *shape, dtype=dtype)
    q, scale = quant.quantize_128x128(w, pow2=pow2)
    assert q.shape == w.shape and q.is_contiguous() and scale.is_contiguous()
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    pieces = zip(q, scale, strict=True) if w.ndim == 3 else [(q, scale)]
    for (q_g, s_g), (want, scales) in zip(pieces, wanted_blocks(shape, dtype, pow2), strict=True):
        assert codes(q_g) == want
        assert s_g.tolist() == scales

    q_t, scale_t = quant.transpose_128x128(q, scale)
    assert q_t.is_contiguous() and scale_t.is_contiguous()
    assert torch.equal(q_t.view(torch.uint8), q.view(torch.uint8).mT)
    assert torch.equal(scale_t, scale.mT)
    if w.ndim == 2:  # a transposed view quantises to the transposed bytes
        again, _ = quant.quantize_128x128(w.t(), pow2=pow2)
        assert torch.equal(again.view(torch.uint8), q_t.view(torch.uint8))


@POW2
def test_blocks_with_special_values(pow2, backend_name):
    w = random_tensor(5, 200, 256, spread=2)
    w[0, 0], w[150, 20], w[199, 140], w[:128, 128:] = math.inf, -math.nan, 2.0**-140, -0.0
    w[128:, 128:] *= 2.0**-130
    want, scales = oracle.quantize_blocks(rows(w), 256, pow2=pow2)
    q, scale = quant.quantize_128x128(w, pow2=pow2)
    assert codes(q) == want
    assert scale.tolist() == scales
    assert scale[0].tolist() == [1.0, 1.0] and codes(q)[0][0] == 0x7F and codes(q)[0][255] == 0x80


def test_extremes_of_the_scale(backend_name):
    floor = torch.tensor([[2.0**-118], [2.0**-119], [2.0**-149], [3.4028234663852886e38]])
    _, scale = quant.quantize_1x128(floor)
    assert scale[0, 0] == scale[0, 1] == scale[0, 2] == np.float32(2.0**-118) / np.float32(448)
    q, scale = quant.quantize_1x128(floor, pow2=True)
    assert scale.tolist() == [[2.0**-126, 2.0**-126, 2.0**-126, 2.0**120]]
    # 2^-118 / 2^-126 = 256, and 3.4e38 / 2^120 = 256 as well
    assert codes(q) == [[0x78], [0x70], [0], [0x78]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
def test_a_bad_value_changes_nothing_outside_its_tile(bad, backend_name):
    x = random_tensor(1, 256, 256, spread=2)
    dirty = x.clone()
    dirty[130, 200] = torch.tensor(bad)
    expected = 0xFF if math.copysign(1, bad) < 0 else 0x7F
    for quantize, spot, tile in (
        (quant.quantize_1x128, (130, 200), (slice(130, 131), slice(128, 256))),
        (quant.quantize_128x1, (200, 130), (slice(200, 201), slice(128, 256))),
        (quant.quantize_128x128, (130, 200), (slice(128, 256), slice(128, 256))),
    ):
        clean_q, clean_scale = quantize(x)
        q, scale = quantize(dirty)
        assert q.view(torch.uint8)[spot] == expected
        assert (scale != clean_scale).sum() == 1 and scale[scale != clean_scale].item() == 1.0
        outside = torch.ones(256, 256, dtype=torch.bool)
        outside[tile] = False
        assert torch.equal(q.view(torch.uint8)[outside], clean_q.view(torch.uint8)[outside])
        assert q.float().isnan().sum() == 1
