"""What users of the FP8 quantisers rely on: dequantised values, errors, idempotence, exact requantisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import quantize as quant

from . import oracle_quantize as oracle
from .quantize_cases import E4M3, check_columns, codes, i32, random_tensor, special_rows

POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["fp32_scale", "pow2_scale"])


def test_every_code_decodes_exactly(backend_name):
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite = [c for c in range(256) if c & 0x7F != 0x7F]
    for q in (every[None], every[finite][None]):  # with NaN and without take different ways
        got = quant.dequantize_1x128(q, torch.ones(2, 4))
        want = [oracle.decode(c, oracle.E4M3) for c in q.view(torch.uint8)[0].tolist()]
        for a, b in zip(got[0].tolist(), want, strict=True):
            assert (a == b or (math.isnan(a) and math.isnan(b))) and math.copysign(1, a) == math.copysign(
                1, b
            )


@POW2
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 300), (130, 260)])
def test_dequantised_values(pow2, shape, backend_name):
    x = random_tensor(7, *shape)
    for quantize, dequantize, turn in (
        (quant.quantize_1x128, quant.dequantize_1x128, lambda v: v),
        (quant.quantize_128x128, quant.dequantize_128x128, lambda v: v),
        (
            quant.quantize_128x1,
            lambda q, s, **kw: quant.dequantize_128x1(q, s, x.shape[0], **kw),
            lambda v: v.t()[: x.shape[0]],
        ),
    ):
        q, scale = quantize(x, pow2=pow2)
        if quantize is quant.quantize_128x128:
            per_value = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
        else:
            per_value = scale.t()[: q.shape[0]].repeat_interleave(128, 1)[:, : q.shape[1]]
        exact = turn(q.double() * per_value.double())
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            got = dequantize(q, scale, dtype=dtype)
            assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
            assert torch.equal(got, exact.float().to(dtype) if dtype != torch.float64 else exact)


@POW2
def test_error_of_every_element_is_half_a_unit_of_its_binade(pow2, backend_name):
    x = random_tensor(11, 64, 1024, spread=20)
    q, scale = quant.quantize_1x128(x, pow2=pow2)
    per_value = scale.t()[:64].repeat_interleave(128, 1).double()
    exponent = torch.frexp(q.double()).exponent.sub(1).clamp_min(-6)
    half_unit = torch.ldexp(torch.full((64, 1024), 0.5, dtype=torch.float64), exponent - 3)
    slack = 0 if pow2 else q.double().abs() * 2.0**-22  # three fp32 roundings
    error = (x.double() / per_value - q.double()).abs()
    assert (error <= half_unit + slack).all()
    assert (error > 0.98 * half_unit).any()  # the bound is attained


@POW2
def test_rounding_has_no_direction(pow2, backend_name):
    x = (
        torch.rand(256, 1024, generator=torch.Generator().manual_seed(13)) * 2 - 1
    )  # no density to favour a side
    q, scale = quant.quantize_1x128(x, pow2=pow2)
    error = (quant.dequantize_1x128(q, scale, dtype=torch.float64) - x.double()) * x.sign().double()
    moved = error != 0
    below = (error < 0).sum() / moved.sum()
    assert abs(below - 0.5) < 10 / moved.sum() ** 0.5
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5


@given(seed=st.integers(0, 999))
def test_quantising_dequantised_values_is_idempotent(seed, backend_name):
    x = random_tensor(seed, 4, 300)
    for quantize, dequantize in (
        (quant.quantize_1x128, quant.dequantize_1x128),
        (quant.quantize_128x128, quant.dequantize_128x128),
    ):
        first = quantize(x, pow2=True)
        values = dequantize(*first)
        second = quantize(values, pow2=True)
        assert torch.equal(dequantize(*second), values)  # no value ever moves again
        # Bytes repeat too, unless the greatest code is exactly 224: that tile then fits half the scale.
        third = quantize(dequantize(*second), pow2=True)
        same = first if not ((first[0].float().abs() == 224).any()) else third
        assert codes(second[0]) == codes(same[0]) and torch.equal(second[1], same[1])


@given(
    shape=st.sampled_from([(0, 3), (5, 0), (100, 3), (300, 5), (128, 20), (3, 260)]), seed=st.integers(0, 99)
)
def test_requantising_powers_of_two_rounds_only_what_underflows(shape, seed, backend_name):
    x = random_tensor(seed, *shape, spread=6)
    q, scale = quant.quantize_1x128(x, pow2=True)
    held = quant.dequantize_1x128(q, scale)
    q_t, scale_t = quant.requantize_128x1(q, scale)
    check_columns(held, q_t, scale_t, pow2=True)
    got = quant.dequantize_128x1(q_t, scale_t, shape[0])
    unit = (2.0**-9 * scale_t[:, : shape[1]]).repeat_interleave(128, 0)[: shape[0]]
    fits = (held / unit).frac() == 0
    assert torch.equal(got[fits], held[fits])
    assert ((got - held).abs() <= unit / 2).all()
    assert (held[~fits].abs() < 8 * unit[~fits]).all()  # subnormals of the new tile, no other value


def test_requantising_special_and_arbitrary_scales_and_groups(backend_name):
    x = special_rows(384)
    for pow2 in (True, False):
        q, scale = quant.quantize_1x128(x, pow2=pow2)
        held = quant.dequantize_1x128(q, scale)
        check_columns(held, *quant.requantize_128x1(q, scale), pow2=True)
        offsets = i32([0, 3, 3, 20])
        got = quant.requantize_128x1(q, scale, offsets=offsets)
        want = quant.quantize_128x1(held, pow2=True, offsets=offsets)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert (q.float().isnan()).any()
