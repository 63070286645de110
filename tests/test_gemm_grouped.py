"""fp8_gemm_grouped and fp8_gemm_masked on every backend: bits, rows of no group, foreign memory, groups of any kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepseek_ops
from deepseek_ops import _registry
from deepseek_ops._emulation import ASYNCHRONY, SCHEDULES
from deepseek_ops._gemm_checks import FP8_GROUPED_TILES
from deepseek_ops.gemm import fp8_gemm, fp8_gemm_grouped, fp8_gemm_masked

from .quantize_cases import on_reference
from .test_gemm import BF16, E4M3, FP32, as_stored, blocks64, i32, offsets_of, rows64, rows_of, weight_of

ZIPF = [60, 0, 30, 1, 20, 0, 15, 0]
# research/gemm-quant.md 7.4: sizes of groups, rows before them, rows behind.
SIZES = {
    "one": ([130], 0, 0),
    "all_empty": ([0] * 8, 2, 5),
    "one_hot": ([0, 0, 77, 0], 1, 0),
    "first_and_last_empty": ([0, 64, 65, 0], 3, 4),
    "one_row_each": ([1] * 32, 0, 0),
    "odd_tiles": ([192, 3], 0, 1),
    "zipf": (ZIPF, 0, 70),
    "257": ([3 if g % 50 == 7 else 0 for g in range(257)], 2, 2),
}
of_sizes = pytest.mark.parametrize(("sizes", "before", "after"), SIZES.values(), ids=SIZES.keys())


@on_reference
def batch_of(g: int, m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, scale = rows_of(g * m, k)
    scales = torch.ones(g, -(-k // 128), -(-m // 4) * 4)
    scales[..., :m] = scale[:, : g * m].reshape(-(-k // 128), g, m).transpose(0, 1)
    return a.view(g, m, k), scales


def hopper_grouped(a, sa, b, sb, offsets, dtype=FP32):
    """What every backend must give, bit for bit."""
    with deepseek_ops.backend("modelled"):
        return fp8_gemm_grouped(a, sa, b, sb, offsets, out_dtype=dtype)


def hopper_masked(a, sa, b, sb, counts, dtype=FP32):
    with deepseek_ops.backend("modelled"):
        return fp8_gemm_masked(a, sa, b, sb, counts, out_dtype=dtype)


def room_for(x: torch.Tensor, before: int, after: int, fill: float) -> torch.Tensor:
    """A view with the values of x in a larger buffer: gaps between rows, before the first and behind the last."""
    codes = x.view(torch.uint8) if x.dtype == E4M3 else x
    room = torch.full((*x.shape[:-2], x.shape[-2] + 2, before + x.shape[-1] + after), fill, dtype=codes.dtype)
    view = room[..., 1:-1, before : before + x.shape[-1]]
    view.copy_(codes)
    return view.view(x.dtype)


@of_sizes
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_groups_in_foreign_memory(sizes, before, after, dtype, backend_name):
    """Rows of no group are zero in a fresh result and untouched in `out`; nothing around the operands is touched."""
    torch.manual_seed(0)
    rows, n, k = before + sum(sizes) + after, 72, 144
    (a, sa), (b, sb) = rows_of(rows, k), weight_of(len(sizes), n, k)
    offsets = i32(list(itertools.accumulate(sizes, initial=before)))
    inside = slice(before, before + sum(sizes))
    for part in (a[:before], a[inside.stop :]):
        part.view(torch.uint8).fill_(0x7F)
    want = hopper_grouped(a, sa, b, sb, offsets, dtype)
    operands = (
        room_for(a, 16, 32, 0x7F),
        room_for(sa, 4, 8, float("nan")),
        room_for(b, 32, 16, 0x7F),
        room_for(sb, 1, 2, float("nan")),
    )
    stored = [as_stored(x) for x in operands]
    fresh = fp8_gemm_grouped(*operands, offsets, out_dtype=dtype, accumulation="hopper")
    assert torch.equal(fresh, want)
    assert (fresh[:before] == 0).all() and (fresh[inside.stop :] == 0).all()
    exact = torch.cat([rows64(a, sa)[:0] @ blocks64(b[0], sb[0]).T] + [
        rows64(a[s:e], sa[:, s:e]) @ blocks64(b[g], sb[g]).T
        for g, (s, e) in enumerate(itertools.pairwise(offsets.tolist()))
    ])  # fmt: skip
    rounding = exact.abs() * 2**-8 if dtype == BF16 else 0
    assert ((fresh[inside].double() - exact).abs() <= rounding + 5e-3 * k**0.5).all()
    for gap in (8, 1) if dtype == BF16 else (1,):  # what TMA can address, and what it cannot
        out = room_for(torch.full((rows, n), 777.0, dtype=dtype), 8 * (gap == 8), gap, 777.0)
        expected = as_stored(room_for(torch.full_like(want, 777.0), 8 * (gap == 8), gap, 777.0))
        assert fp8_gemm_grouped(*operands, offsets, out=out, accumulation="hopper") is out
        assert torch.equal(out[inside], want[inside])
        out[inside] = 777.0
        assert torch.equal(as_stored(out), expected)
    assert all(torch.equal(as_stored(x), y) for x, y in zip(operands, stored, strict=True))


COUNTS = {
    "full": ([70, 70], 70),
    "none": ([0, 0, 0], 7),
    "mixed": ([0, 130, 1, 64, 131], 131),
    "decode": ([g % 5 * (g % 3) for g in range(32)], 20),
    "one": ([9], 12),
}


@pytest.mark.parametrize(("counts", "mmax"), COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_batches_in_foreign_memory(counts, mmax, dtype, backend_name):
    torch.manual_seed(0)
    g, n, k = len(counts), 136, 144
    (a, sa), (b, sb), index = batch_of(g, mmax, k), weight_of(g, n, k), i32(counts)
    there = torch.arange(mmax)[None, :] < index[:, None]
    a.view(torch.uint8)[~there] = 0x7F
    want = hopper_masked(a, sa, b, sb, index, dtype)
    operands = (
        room_for(a, 16, 32, 0x7F),
        room_for(sa, 4, 8, float("nan")),
        room_for(b, 32, 16, 0x7F),
        room_for(sb, 1, 2, float("nan")),
    )
    stored = [as_stored(x) for x in operands]
    fresh = fp8_gemm_masked(*operands, index, out_dtype=dtype, accumulation="hopper")
    assert torch.equal(fresh, want) and (fresh[~there] == 0).all()
    exact = rows64(a, sa) @ blocks64(b, sb).mT
    rounding = exact[there].abs() * 2**-8 if dtype == BF16 else 0
    assert ((fresh[there].double() - exact[there]).abs() <= rounding + 5e-3 * k**0.5).all()
    for gap in (8, 1) if dtype == BF16 else (1,):
        out = room_for(torch.full((g, mmax, n), 777.0, dtype=dtype), 8 * (gap == 8), gap, 777.0)
        assert fp8_gemm_masked(*operands, index, out=out, accumulation="hopper") is out
        assert torch.equal(out[there], want[there])
        out[there] = 777.0
        assert (torch.tensor([], dtype=dtype).set_(out.untyped_storage()) == 777.0).all()
    assert all(torch.equal(as_stored(x), y) for x, y in zip(operands, stored, strict=True))


@given(
    st.lists(st.sampled_from([0, 0, 1, 5, 64, 70]), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([8, 33, 136, 200]),
    st.sampled_from([0, 16, 144]),
    st.sampled_from([BF16, FP32]),
)
def test_any_groups(backend_name, sizes, before, after, n, k, dtype):
    torch.manual_seed(n + k)
    rows, g = before + sum(sizes) + after, len(sizes)
    (a, sa), (b, sb) = rows_of(rows, k), weight_of(g, n, k)
    offsets = i32(list(itertools.accumulate(sizes, initial=before)))
    got = fp8_gemm_grouped(a, sa, b, sb, offsets, out_dtype=dtype, accumulation="hopper")
    assert torch.equal(got, hopper_grouped(a, sa, b, sb, offsets, dtype))
    (a, sa), counts = batch_of(g, 70, k), i32(sizes)
    got = fp8_gemm_masked(a, sa, b, sb, counts, out_dtype=dtype, accumulation="hopper")
    assert torch.equal(got, hopper_masked(a, sa, b, sb, counts, dtype))


def test_no_groups_and_no_sizes(backend_name):
    """Nothing to multiply: zeros, or nothing at all."""
    for rows, n, k in ((5, 8, 16), (0, 8, 16), (5, 0, 16), (5, 8, 0)):
        a, sa = rows_of(rows, k)
        for g in (0, 2):
            b, sb = weight_of(g, n, k)
            fresh = fp8_gemm_grouped(a, sa, b, sb, i32([0] * (g + 1)))
            out = torch.full((rows, n), 7.0)
            fp8_gemm_grouped(a, sa, b, sb, i32([0] * (g + 1)), out=out)
            assert fresh.shape == (rows, n) and (fresh == 0).all() and (out == 7.0).all()
            batch, scales = batch_of(g, rows, k)
            fresh = fp8_gemm_masked(batch, scales, b, sb, i32([0] * g))
            assert fresh.shape == (g, rows, n) and (fresh == 0).all()
        if k == 0:  # rows that a group owns, and nothing to add up
            assert (fp8_gemm_grouped(a, sa, b, sb, i32([0, 2, rows])) == 0).all()
            assert (fp8_gemm_masked(batch, scales, b, sb, i32([rows, 2])) == 0).all()


def test_every_group_is_fp8_gemm_of_its_rows(backend_name):
    """In the default accumulation, of whichever backend runs."""
    torch.manual_seed(0)
    sizes = [16, 0, 48]
    (a, sa), (b, sb) = rows_of(64, 272), weight_of(3, 40, 272)
    got = fp8_gemm_grouped(a, sa, b, sb, offsets_of(sizes), out_dtype=FP32)
    for g, (s, e) in enumerate(itertools.pairwise([0, 16, 16, 64])):
        want = fp8_gemm(a[s:e], sa[:, s:e].clone(), b[g], sb[g], out_dtype=FP32)
        assert torch.allclose(got[s:e], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [None, *FP8_GROUPED_TILES], ids=lambda t: t and f"{t[0]}x{t[1]}")
def test_knobs_change_no_bit(tile, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb), offsets = rows_of(200, 144), weight_of(3, 264, 144), i32([1, 72, 72, 199])
    want = hopper_grouped(a, sa, b, sb, offsets)
    (batch, scales), counts = batch_of(3, 70, 144), i32([70, 0, 31])
    want_masked = hopper_masked(batch, scales, b, sb, counts)
    for num_sms, dtype in ((0, BF16), (1, FP32), (3, BF16), (1000, FP32)):
        knobs = {"accumulation": "hopper", "tile": tile, "num_sms": num_sms, "out_dtype": dtype}
        assert torch.equal(fp8_gemm_grouped(a, sa, b, sb, offsets, **knobs), want.to(dtype))
        assert torch.equal(fp8_gemm_masked(batch, scales, b, sb, counts, **knobs), want_masked.to(dtype))


@pytest.mark.parametrize("k", [72, 200])
def test_rows_that_tma_cannot_address_are_copied(k, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb), offsets = rows_of(50, k), weight_of(2, 24, k), i32([0, 20, 50])
    assert torch.equal(
        fp8_gemm_grouped(a, sa, b, sb, offsets, out_dtype=FP32, accumulation="hopper"),
        hopper_grouped(a, sa, b, sb, offsets),
    )
    batch, scales = batch_of(2, 9, k)
    assert torch.equal(
        fp8_gemm_masked(batch, scales, b, sb, i32([9, 4]), out_dtype=FP32, accumulation="hopper"),
        hopper_masked(batch, scales, b, sb, i32([9, 4])),
    )


def test_twenty_runs_of_any_schedule_give_the_same_bits(backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb), offsets = rows_of(140, 144), weight_of(4, 136, 144), i32([0, 65, 65, 70, 139])
    want = fp8_gemm_grouped(a, sa, b, sb, offsets, accumulation="hopper")
    for seed in range(20):
        with deepseek_ops.emulation(
            seed=seed,
            schedule=SCHEDULES[seed % 4],
            asynchrony=ASYNCHRONY[seed % 3],
            sm_count=1 + seed % 5,
        ):
            assert torch.equal(fp8_gemm_grouped(a, sa, b, sb, offsets, accumulation="hopper"), want)


def test_new_offsets_in_the_same_tensor_are_seen(backend_name):
    """Nothing of them is kept on the host: what a captured graph relies on."""
    torch.manual_seed(0)
    (a, sa), (b, sb), offsets = rows_of(64, 144), weight_of(2, 24, 144), i32([0, 40, 64])
    for bounds in ([0, 40, 64], [0, 0, 64], [10, 20, 30]):
        offsets.copy_(i32(bounds))
        got = fp8_gemm_grouped(a, sa, b, sb, offsets, out_dtype=FP32, accumulation="hopper")
        assert torch.equal(got, hopper_grouped(a, sa, b, sb, i32(bounds)))


@pytest.mark.parametrize("name", ["emulated", "checked"])
def test_nonsense_on_the_device_stays_within_the_output(name):
    """The reference refuses such offsets; a kernel clamps them and makes them ascend, and writes nothing else."""
    reason = _registry.absent_reason(name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(70, 144), weight_of(4, 72, 144)
    for given_, meant in (
        ([0, 40, 20, 30, 60], [0, 40, 40, 40, 60]),
        ([-5, 10, 2**31 - 1, 50, -(2**31)], [0, 10, 70, 70, 70]),
    ):
        want = hopper_grouped(a, sa, b, sb, i32(meant))
        frame = torch.full((74, 88), 777.0)
        with deepseek_ops.backend(name):
            got = fp8_gemm_grouped(a, sa, b, sb, i32(given_), out_dtype=FP32)
            fp8_gemm_grouped(a, sa, b, sb, i32(given_), out=frame[2:72, 8:80])
        assert torch.equal(got, want)
        inside = slice(2 + meant[0], 2 + meant[-1])
        assert torch.equal(frame[inside, 8:80], want[meant[0] : meant[-1]])
        frame[inside, 8:80] = 777.0
        assert (frame == 777.0).all()
    batch, scales = batch_of(4, 20, 144)
    want = hopper_masked(batch, scales, b, sb, i32([0, 20, 5, 20]))
    with deepseek_ops.backend(name):
        got = fp8_gemm_masked(batch, scales, b, sb, i32([-3, 2**31 - 1, 5, 21]), out_dtype=FP32)
    assert torch.equal(got, want)
