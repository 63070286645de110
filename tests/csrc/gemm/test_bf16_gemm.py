"""bf16_gemm's own source on the CPU: the model's bits for every tile, major, cluster, grouping and edge."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from .bf16_problem import (
    BF16,
    EAGER,
    FP32,
    K_BY_MASK,
    K_BY_OFFSETS,
    LAZY,
    MULTICAST,
    NAN,
    RANDOM,
    ROWS_BY_MASK,
    ROWS_BY_OFFSETS,
    Problem,
)
from .dense_library import dense_library

TILES = [(256, 128), (128, 256), (128, 192), (128, 128), (64, 256), (64, 128)]
MAJORS = ("kk", "km", "mk", "mm")  # of A and B: K or rows contiguous

by_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
by_cluster = pytest.mark.parametrize("multicast", MULTICAST)
by_major = pytest.mark.parametrize("majors", MAJORS)


@pytest.fixture(scope="module")
def plain() -> ctypes.CDLL:
    return dense_library("bf16_gemm", checked=False)


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return dense_library("bf16_gemm", checked=True)


# Ragged on every side; more tiles than SMs; a tail of K; no K at all; odd strides and an odd base of D.
EDGES = {
    "ragged": {"m": 130, "n": 264, "k": 136},
    "padded_rows": {"m": 65, "n": 200, "k": 72, "accumulate": True, "gap": 8},
    "odd_stride": {"m": 200, "n": 300, "k": 51, "accumulate": True, "gap": 1, "offset": 1},
}


@by_tile
@by_cluster
@by_major
@pytest.mark.parametrize(("edge", "dtype"), [(e, d) for e, d in zip(EDGES, (BF16, BF16, FP32), strict=True)])
def test_bits_of_every_tile_major_and_edge(plain, tile, multicast, majors, edge, dtype):
    Problem(dtype=dtype, majors=majors, **EDGES[edge]).must_match(
        plain, tile=tile, multicast=multicast, sms=4
    )


@pytest.mark.parametrize("m", [0, 1, 7, 63, 64, 128, 257])
@pytest.mark.parametrize(("n", "k"), [(0, 128), (8, 16), (33, 0), (72, 144), (136, 520), (576, 16)])
def test_bits_of_chosen_tiles(plain, m, n, k):
    for dtype in (BF16, FP32):
        Problem(m, n, k, "km", dtype, accumulate=m % 2 == 1).must_match(plain)


def test_ring_goes_around_many_times(plain):
    """More slices than stages, more tiles than SMs: the phase of every barrier turns several times."""
    Problem(130, 260, 1200, "mk", FP32).must_match(plain, tile=(128, 128), multicast="b", sms=2)


GROUPED = {
    "rows_by_offsets": {
        "m": 300,
        "n": 136,
        "k": 72,
        "grouping": ROWS_BY_OFFSETS,
        "index": [3, 3, 70, 71, 201, 295],
    },
    "rows_by_mask": {"m": 140, "n": 136, "k": 72, "grouping": ROWS_BY_MASK, "index": [0, 140, 1, 64, 129]},
    "k_by_offsets": {
        "m": 72,
        "n": 264,
        "k": 300,
        "grouping": K_BY_OFFSETS,
        "index": [2, 3, 3, 131, 195, 290],
    },
    "k_by_mask": {"m": 130, "n": 72, "k": 140, "grouping": K_BY_MASK, "index": [0, 140, 1, 64, 129]},
}


@by_cluster
@by_major
@pytest.mark.parametrize("grouping", GROUPED)
@pytest.mark.parametrize("tile", [(256, 128), (128, 192), (64, 128)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_bits_of_groups(plain, grouping, tile, multicast, majors):
    """Rows and K of no group are NaN; rows of no group in D stay as they are, or become zero in a fresh result."""
    for dtype, gap in ((BF16, 0), (FP32, 1)):
        clear = majors[0] == "k" and grouping.startswith("rows")
        problem = Problem(majors=majors, dtype=dtype, clear=clear, gap=gap, **GROUPED[grouping])
        problem.must_match(plain, tile=tile, multicast=multicast, sms=4)


@by_major
def test_every_length_of_a_last_slice_between_nan(plain, majors):
    """Groups of every length from 1 to 64 of K, each between two that are NaN throughout."""
    ends = [0]
    for length in range(1, 65):
        ends += [ends[-1] + 3, ends[-1] + 3 + length]
    problem = Problem(9, 11, ends[-1] + 5, majors, FP32, accumulate=True, grouping=K_BY_OFFSETS, index=ends)
    for x in (problem.a, problem.b):
        for start, stop in zip(ends[0::2], ends[1::2], strict=False):
            x[:, start:stop] = NAN
    assert problem.run(plain, tile=(64, 128)) == ""
    result, expected = problem.rows_of(problem.room), problem.rows_of(problem.expected)
    assert result[0::2].isnan().all() and torch.equal(result[1::2], expected[1::2])


@pytest.mark.parametrize("asynchrony", [EAGER, RANDOM, LAZY])
@by_cluster
@pytest.mark.parametrize(
    ("tile", "majors", "grouping"),
    [
        ((256, 128), "km", None),
        ((128, 192), "mm", "k_by_offsets"),
        ((64, 256), "mk", "rows_by_offsets"),
        ((128, 128), "kk", "k_by_mask"),
    ],
    ids=lambda v: str(v),
)
def test_no_hazards(checked, tile, majors, grouping, multicast, asynchrony):
    for seed in range(2):
        case = GROUPED[grouping] if grouping else {"m": 130, "n": 264, "k": 400, "accumulate": seed == 1}
        problem = Problem(majors=majors, clear=grouping == "rows_by_offsets", **case)
        problem.checked = 1
        problem.must_match(
            checked,
            tile=tile,
            multicast=multicast,
            sms=2,
            seed=seed,
            asynchrony=asynchrony,
            schedule=seed * 2 + 1,
        )


def test_repeats_and_tiles_give_the_same_bits(plain):
    results = set()
    for tile, multicast, sms, seed in [
        ((128, 128), "none", 1, 0),
        ((128, 192), "a", 4, 1),
        ((64, 256), "b", 2, 2),
    ]:
        problem = Problem(200, 300, 400, dtype=FP32)
        assert problem.run(plain, tile=tile, multicast=multicast, sms=sms, seed=seed) == ""
        results.add(problem.room.numpy().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("grouping", ["rows_by_offsets", "k_by_offsets"])
def test_nonsense_of_the_device_stays_in_bounds(checked, grouping):
    """Offsets that leave the tensor or descend: nothing but D is written, nothing but the operands read."""
    for index in ([-(2**31), -5, 2**31 - 1, 12], [0, 50, 20, 20], [10**6, 10**7, -1, -1]):
        problem = Problem(**{**GROUPED[grouping], "index": [0, 0, 0, 0]})
        problem.index = torch.tensor(index, dtype=torch.int32)
        problem.checked = 1
        assert problem.run(checked, tile=(128, 128), sms=2) == ""
        d = problem.rows_of(problem.room)
        d.copy_(problem.rows_of(problem.expected))
        assert problem.differing() == 0


def test_offsets_beyond_two_to_the_31st(plain):
    """Rows 2^25 elements apart: 32-bit arithmetic of elements or bytes would fold them onto each other."""
    apart, rows, k = 1 << 25, 70, 40
    try:  # only the pages that are touched take memory
        memory = [torch.empty(rows * apart, dtype=BF16) for _ in range(3)]
    except RuntimeError as error:
        pytest.skip(f"no address space for 3 x {rows * apart * 2 >> 30} GiB: {error}")
    problem = Problem(rows, rows, k)
    a, b = (torch.as_strided(x, (rows, k), (apart, 1)) for x in memory[:2])
    problem.a, problem.b = a.copy_(problem.a), b.copy_(problem.b)
    for direct in (False, True):  # by TMA, and by threads
        d = torch.as_strided(memory[2], (rows, rows), (apart, 1), int(direct))
        assert problem.run(plain, d=d.data_ptr(), d_row=apart) == ""
        assert torch.equal(d, problem.rows_of(problem.expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": -1}, r"^m: must be in .*; got -1"),
        ({"k": 1 << 31}, r"^k: must be in .*; got 2147483648"),
        ({"a": None}, r"^a: must not be null"),
        ({"b_row": 200}, r"^b: must have one of its two dimensions contiguous .*; got strides \[200, 1\]"),
        ({"a_row": 276}, r"^a: must have one of its two dimensions contiguous .*; got strides \[276, 1\]"),
        ({"a_k": 2}, r"^a: must have one of its two dimensions contiguous"),
        ({"a_matrices": 2, "a_matrix": 4}, r"^a: must have matrices at multiples of 16 bytes"),
        ({"d_row": 8}, r"^d_stride: must be at least .*; got 8"),
        ({"num_sms": -2}, r"^num_sms: must not be negative.*; got -2"),
        ({"grouping": ROWS_BY_OFFSETS}, r"^index: must not be null"),
        ({"tile_rows": 128, "tile_columns": 64}, r"^tile: must be one of \(256, 128\), .*; got \(128, 64\)"),
        ({"tile": (128, 128), "multicast": "a", "sms": 1}, r"^multicast: needs at least two"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_argument_errors(plain, change, message):
    problem = Problem(130, 264, 272)
    before = problem.room.clone()
    assert re.search(message, problem.run(plain, **change))
    assert torch.equal(problem.room, before)


def test_pointer_errors(plain):
    problem = Problem(130, 264, 272)
    assert re.search(r"^a: must start at a multiple of 16", problem.run(plain, a=problem.a.data_ptr() + 8))
    assert re.search(r"^d: must be aligned", problem.run(plain, d=problem.room.data_ptr() + 1))
    assert re.search(r"^d: must not overlap an input.*; got b", problem.run(plain, d=problem.b.data_ptr()))
