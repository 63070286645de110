"""The grouped FP8 GEMMs' own source on the CPU: bit for bit the `hopper` reference for every tile, cluster and edge."""

from __future__ import annotations

import functools
import itertools
import mmap
import re

import pytest
import torch

from .grouped_problem import BF16, CANARY, DENSE, FP32, GROUPED, MASKED, MULTICAST, Problem, drop_sites, run

TILES = [(128, 256), (128, 192), (128, 160), (128, 128), (64, 128), (64, 256)]
KINDS = {"grouped": GROUPED, "masked": MASKED}
# Ends of groups inside of a tile, at its end, one row past it; an odd number of tiles per group, so that a cluster has
# one too many; empty groups between, before and behind; D that TMA cannot address, or not to the end.
EDGES = {
    "ragged": {"sizes": [70, 0, 130, 1, 64], "n": 264, "k": 272, "first": 3, "spare": 5, "room": 140},
    "whole_tiles": {"sizes": [0, 128, 256, 64], "n": 256, "k": 160},
    "odd_stride": {"sizes": [129, 3, 0], "n": 201, "k": 144, "gap": 2, "offset": 1, "first": 1, "room": 130},
    "padded_rows": {"sizes": [65, 127], "n": 196, "k": 128, "gap": 4, "spare": 70, "clear": False},
    "no_k": {"sizes": [5, 130], "n": 136, "k": 0, "first": 2, "spare": 2},
}


@functools.cache
def problem(kind: int, edge: str, dtype: torch.dtype) -> Problem:
    return Problem(kind, dtype=dtype, **EDGES[edge])


RUNS = list(itertools.product(TILES, MULTICAST, KINDS))


@pytest.mark.parametrize(
    ("tile", "multicast", "kind", "number"),
    [(*r, i) for i, r in enumerate(RUNS)],
    ids=lambda x: f"{x[0]}x{x[1]}" if isinstance(x, tuple) else str(x),
)
def test_bits_of_every_tile_cluster_and_edge(tile, multicast, kind, number):
    """Every kernel on two of the five edges, which wander over the kernels."""
    for i, dtype in enumerate((BF16, FP32)):
        for j in range(2):
            edge = list(EDGES)[(number // 6 + number % 6 + 2 * i + j) % len(EDGES)]
            problem(KINDS[kind], edge, dtype).must_match(tile, multicast, sms=4, seed=number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_bits_of_chosen_tiles(kind, edge):
    for sms in (1, 5):
        problem(KINDS[kind], edge, BF16).must_match(sms=sms)


@pytest.mark.parametrize("asynchrony", [0, 1, 2], ids=["eager", "random", "lazy"])
@pytest.mark.parametrize("multicast", MULTICAST)
@pytest.mark.parametrize("kind", KINDS)
def test_no_hazards(kind, multicast, asynchrony):
    for seed, (tile, dtype, edge, schedule) in enumerate(
        [
            ((128, 128), BF16, "ragged", 3),
            ((64, 256), BF16, "padded_rows", 1),
            ((128, 160), FP32, "ragged", 2),
        ]
    ):
        problem(KINDS[kind], edge, dtype).must_match(
            tile, multicast, sms=2, seed=seed, asynchrony=asynchrony, schedule=schedule, check=True
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [32, 257, 512])
def test_many_groups(kind, groups):
    """Tables of several rounds of a warp, most groups empty: Zipf, 100 / rank rows in a mixed order."""
    sizes = [40 // (1 + g * 37 % groups) for g in range(groups)]
    for clear in (True, False):
        p = Problem(KINDS[kind], sizes, 16, 128, first=9, spare=4, clear=clear)
        p.must_match((64, 128), "none", sms=4, check=groups == 257)
    one = [1] * groups
    Problem(KINDS[kind], one, 8, 16, FP32).must_match((64, 128), "a", sms=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[0, 0, 0], [], [0, 9], [9, 0]], ids=str)
def test_nothing_or_little_to_do(kind, sizes):
    for clear in (True, False):
        for first, spare in ((0, 0), (4, 6)):
            p = Problem(KINDS[kind], sizes, 40, 144, first=first, spare=spare, room=12, clear=clear)
            p.must_match((128, 128), "b", sms=2, check=True)


NONSENSE = {
    "descending": ([0, 40, 20, 30, 60], [0, 40, 40, 40, 60]),
    "negative": ([-7, -1, 10, 5, 70], [0, 0, 10, 10, 70]),
    "too_large": ([3, 1 << 30, 50, (1 << 31) - 1, -(1 << 31)], [3, 70, 70, 70, 70]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_in_offsets_stays_within_d(name):
    """Clamped to the rows and made to ascend; no access outside of the operands, which are registered to the byte."""
    given, meant = NONSENSE[name]
    sizes = [b - a for a, b in itertools.pairwise(meant)]
    for dtype, clear in ((BF16, True), (FP32, False)):
        p = Problem(GROUPED, sizes, 136, 144, dtype, first=meant[0], spare=70 - meant[-1], clear=clear)
        p.index.copy_(torch.tensor(given, dtype=torch.int32))
        p.must_match((128, 128), "b", sms=4, check=True)


def test_nonsense_in_counts_stays_within_d():
    p = Problem(MASKED, [0, 70, 5, 70], 136, 144, room=70)
    p.index.copy_(torch.tensor([-1, 1 << 30, 5, (1 << 31) - 1], dtype=torch.int32))
    p.must_match((128, 128), "b", sms=4, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_group(kind):
    """Loads run past the end of a group, of its rows and of its columns: none of that may show."""
    p = Problem(KINDS[kind], [70, 30, 140], 200, 300, FP32, room=150)
    p.b[1] = 0x7F
    p.scale_b[1] = torch.inf
    rows = p.a[1] if kind == "masked" else p.a[70:100]
    rows[:] = 0x7F
    for multicast in MULTICAST:
        p.buffer.fill_(CANARY)
        assert run([p.call((128, 160), multicast, 4)]) == ""
        got, want = p.matrix(p.buffer), p.matrix(p.expected)
        if kind == "masked":
            assert torch.equal(got[[0, 2]], want[[0, 2]]) and got[1, :30].isnan().all()
            assert (got[1, 30:] == 0).all()
        else:
            assert torch.equal(got[:70], want[:70]) and torch.equal(got[100:], want[100:])
            assert got[70:100].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_elements_past_2_to_31(kind, dtype):
    """Rows (matrices) of D so far apart that their offsets need 64 bits, in memory that is there only where touched."""
    p = Problem(KINDS[kind], [3, 2], 136, 128, dtype, room=4, spare=1)
    step = (1 << 29) + 16
    d_stride, d_group_stride = (step, 0) if kind == "grouped" else (p.n + 8, 5 * step)
    rows = p.m - 1 if kind == "grouped" else 0
    elements = rows * d_stride + d_group_stride + p.m * p.stride + 4096
    assert elements > 1 << 31
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, elements * p.buffer.element_size(), flags=flags)
    d = torch.frombuffer(memory, dtype=dtype)
    call = p.call((64, 128), "none", 4, d=d.data_ptr(), d_stride=d_stride, d_group_stride=d_group_stride)
    assert run([call]) == ""
    want = p.matrix(p.expected)
    for index in itertools.product(*map(range, want.shape[:-1])):
        at = index[-1] * d_stride + (index[0] * d_group_stride if kind == "masked" else 0)
        assert torch.equal(d[at : at + p.n], want[index])


@functools.cache
def chain(dtype: torch.dtype) -> tuple[list, Problem]:
    """Three calls on one stream and one D: all rows by groups, a dense product added to them, some rows anew by groups.

    The expectation is in the first problem.
    """
    first = Problem(GROUPED, [70, 60], 128, 144, dtype)
    second = Problem(DENSE, [130], 128, 272, dtype)
    third = Problem(GROUPED, [0, 30, 71], 128, 144, dtype, spare=29, clear=False)
    d = first.matrix(first.expected)
    d.copy_(d.float() + second.wide)
    d[:101] = third.matrix(third.expected)[:101]
    at = first.matrix(first.buffer).data_ptr()
    calls = [
        first.call((128, 128), "a", 4),
        second.call((64, 128), "none", 3, d=at, accumulate=1),
        third.call((64, 128), "b", 4, d=at),
    ]
    return calls, first, second, third


def run_chain(dtype, **how) -> str:
    calls, first, *_ = chain(dtype)
    first.buffer.fill_(CANARY)
    return run(calls, check=True, **how) or ("data" if first.differing() else "")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_a_stream_of_programmatic_launches(dtype):
    """Launches overlap by default: each begins while the one before may still load, multiply and store."""
    for seed, (asynchrony, schedule) in enumerate([(2, 3), (1, 1), (0, 2)]):
        assert run_chain(dtype, seed=seed, asynchrony=asynchrony, schedule=schedule) == ""


def test_launches_that_do_not_wait_are_found():
    run_chain(BF16)
    sites = [site for site in drop_sites() if site[0] == "grid_dependency_wait"]
    assert len(sites) == 2  # of one matrix, and of groups
    for site in sites:
        runs = itertools.product(range(3), (2, 1), (3, 1))
        assert any(run_chain(BF16, seed=s, asynchrony=a, schedule=c, drop=site) for s, a, c in runs), site


BAD = [
    ({"groups": -1}, r"^groups: must be in 0\.\.512.*; got -1"),
    ({"groups": 513}, r"^groups: must be in 0\.\.512.*; got 513"),
    ({"m": -1}, r"^m: must be in .*; got -1"),
    ({"n": 1 << 31}, r"^n: must be in .*; got 2147483648"),
    ({"index": None}, r"^(offsets|counts): must not be null"),
    ({"b": None}, r"^b: must not be null"),
    ({"b_stride": 200}, r"^b_stride: must be at least .*; got 200"),
    ({"b_group_stride": 1000}, r"^b_group_stride: must be at least a whole matrix; got 1000"),
    ({"b_group_stride": 264 * 272 + 8}, r"^b_group_stride: must be a multiple of 16 bytes.*; got 71816"),
    ({"scale_b_group_stride": 3}, r"^scale_b_group_stride: must be at least a whole matrix; got 3"),
    ({"accumulate": 1}, r"^accumulate: must be false.*; got true"),
    ({"num_sms": -2}, r"^num_sms: must not be negative.*; got -2"),
    (
        {"tile_rows": 256, "tile_columns": 128, "multicast": -1},
        r"^tile: must be one of \(128, 256\), .*; got \(256, 128\)",
    ),
    ({"multicast": 1}, r"^multicast: needs a tile"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_argument_errors(kind, change, message):
    p = problem(KINDS[kind], "ragged", BF16)
    p.buffer.fill_(CANARY)
    assert re.search(message, run([p.call(**change)]))
    assert (p.buffer == CANARY).all()


@pytest.mark.parametrize("name", ["a_group_stride", "scale_a_group_stride", "d_group_stride"])
def test_argument_errors_of_batches(name):
    p = problem(MASKED, "ragged", BF16)
    assert re.search(rf"^{name}: must be at least a whole matrix; got 16", run([p.call(**{name: 16})]))


@pytest.mark.parametrize("kind", KINDS)
def test_pointer_errors(kind):
    p = problem(KINDS[kind], "ragged", BF16)
    index = "offsets" if kind == "grouped" else "counts"
    for change, message in (
        ({"a": p.a.data_ptr() + 8}, "a: must start at a multiple of 16"),
        ({"d": p.buffer.data_ptr() + 1}, "d: must be aligned"),
        ({"d": p.b.data_ptr()}, "d: must not overlap an input"),
        ({"index": p.index.data_ptr() + 2}, f"{index}: must be aligned"),
        ({"d": p.index.data_ptr()}, "d: must not overlap an input"),
    ):
        assert run([p.call(**change)]).startswith(message)
