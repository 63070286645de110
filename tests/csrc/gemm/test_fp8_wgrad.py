"""fp8_wgrad's own source on the CPU: bit for bit the `hopper` reference, for every tile, cluster, edge and grouping."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import re
from pathlib import Path

import pytest
import torch

from deepseek_ops import quantize as quant
from deepseek_ops._gemm_checks import FP8_WGRAD_TILES as TILES
from deepseek_ops.reference.gemm import fp8_wgrad as reference
from tests.csrc import building
from tests.csrc.building import ROOT

from .test_fp8_gemm import BF16, EAGER, FP32, LAZY, MULTICAST, RANDOM, padded

by_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
by_cluster = pytest.mark.parametrize("multicast", MULTICAST)


class Call(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("a", "b", "scale_a", "scale_b", "offsets", "d")]
        + [(name, ctypes.c_int64) for name in ("m", "n", "tokens", "groups", "a_stride", "b_stride")]
        + [(name, ctypes.c_int64) for name in ("scale_a_stride", "scale_b_stride", "d_stride", "d_group_stride")]
        + [(name, ctypes.c_int32) for name in ("fp32", "accumulate", "num_sms", "tile_rows", "tile_columns", "multicast")]
        + [("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Emulator, kernel with every access watched, and the C face; built once per change, for the mutation run as well."""
    driver, kernel = Path(__file__).with_name("fp8_wgrad_driver.cpp"), ROOT / "csrc/gemm/fp8_wgrad.cu"
    loaded = building.library("fp8_wgrad", [driver], [kernel])
    for name in ("fp8_wgrad_on_emulator", "fp8_wgrad_choice_on", "drop_sites"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def whole_slices(offsets: list[int], tokens: int) -> list[tuple[int, int]]:
    """What each group owns of operands of that many tokens, in slices, whatever stands in `offsets`."""
    owned = []
    for first, past in itertools.pairwise(offsets):
        begin, end = max(0, -(-first // 128)), min(max(0, past // 128), tokens // 128)
        owned.append((min(begin, end), end))
    return owned


class Problem:
    """Operands of one call, D with canaries around, between its rows and between its groups, and the bits expected there.

    `groups`: tokens of each group, or offsets in full; None: one matrix over `tokens`.
    """

    checked = 0

    def __init__(
        self, m, n, tokens, groups=None, offsets=None, dtype=FP32, accumulate=False, gap=0, offset=0, positive=False
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(m * 7 + n * 3 + tokens)
        draw = torch.rand if positive else torch.randn
        rows = [draw(size, tokens, generator=generator) for size in (m, n)]
        if tokens and not positive:  # scales that differ by channel and by slice
            rows = [x * torch.randn(x.shape[0], 1, generator=generator).mul(2).exp() for x in rows]
            rows = [x * (1 + torch.arange(tokens) // 128) for x in rows]
        (a, self.scale_a), (b, self.scale_b) = (quant.quantize_1x128(x) for x in rows)
        self.a, self.b = padded(a.view(torch.uint8), 16), padded(b.view(torch.uint8), 16)
        self.m, self.n, self.tokens, self.accumulate, self.dtype = m, n, tokens, accumulate, dtype
        if groups is not None:
            offsets = [0, *itertools.accumulate(groups)]
        self.offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
        owned = [(0, -(-tokens // 128))] if offsets is None else whole_slices(offsets, tokens)
        self.groups = len(owned)
        self.stride = max(n + gap, 1)
        self.group_stride = m * self.stride + (8 if gap % 8 == 0 else 1)
        self.room = torch.full((max(self.groups, 1) * self.group_stride + 64,), 7.0, dtype=dtype)
        size = self.room.element_size()
        self.first = -self.room.data_ptr() // size % (16 // size) + offset
        old = torch.randn(self.groups, m, n, generator=generator).to(dtype)
        old[:, :1, :1] = -0.0  # adding nothing would turn it into +0
        if accumulate:
            self.of(self.room).copy_(old)
        self.expected = self.room.clone()
        for g, (begin, end) in enumerate(owned):
            if (begin == end and accumulate and offsets is not None) or m == 0 or n == 0:
                continue
            part, slices = slice(begin * 128, end * 128), slice(begin, end)
            new = reference(
                a[:, part], self.scale_a[slices], b[:, part], self.scale_b[slices], FP32, "hopper"
            )
            self.of(self.expected)[g].copy_(old[g].float() + new if accumulate else new)

    def of(self, room: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(
            room, (self.groups, self.m, self.n), (self.group_stride, self.stride, 1), self.first
        )

    def call(self, tile=(0, 0), multicast="none", sms=3, seed=0, asynchrony=RANDOM, **changes) -> Call:
        call = Call(
            a=self.a.data_ptr(), b=self.b.data_ptr(),
            scale_a=self.scale_a.data_ptr(), scale_b=self.scale_b.data_ptr(),
            offsets=None if self.offsets is None else self.offsets.data_ptr(),
            d=self.room.data_ptr() + self.first * self.room.element_size(),
            m=self.m, n=self.n, tokens=self.tokens, groups=self.groups,
            a_stride=self.a.stride(0), b_stride=self.b.stride(0),
            scale_a_stride=self.scale_a.stride(0), scale_b_stride=self.scale_b.stride(0),
            d_stride=self.stride, d_group_stride=self.group_stride,
            fp32=self.dtype == FP32, accumulate=self.accumulate, num_sms=sms,
            tile_rows=tile[0], tile_columns=tile[1], multicast=MULTICAST[multicast],
            seed=seed, asynchrony=asynchrony, schedule=1, check=self.checked,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(call, name, value)
        return call

    def run(self, **options) -> str:
        return library().fp8_wgrad_on_emulator(ctypes.byref(self.call(**options))).decode()

    def differing(self) -> int:
        bits = torch.int16 if self.dtype == BF16 else torch.int32
        return int((self.room.view(bits) != self.expected.view(bits)).sum())

    def must_match(self, **options) -> None:
        report = self.run(**options)
        assert report == "", report
        assert self.differing() == 0


# Ragged on every side; more tiles than SMs; a tail of tokens; none at all; odd strides and an odd base.
EDGES = {
    "ragged": {"m": 130, "n": 265, "tokens": 272},
    "padded_rows": {"m": 65, "n": 200, "tokens": 144, "accumulate": True, "gap": 8},
    "odd_columns": {"m": 3, "n": 33, "tokens": 128},
    "no_tokens": {"m": 129, "n": 136, "tokens": 0, "accumulate": True},
    "odd_stride": {"m": 200, "n": 300, "tokens": 96, "accumulate": True, "gap": 1, "offset": 1},
    "groups": {"m": 130, "n": 200, "tokens": 640, "groups": [128, 0, 384], "gap": 8},
    "groups_adding": {
        "m": 72,
        "n": 333,
        "tokens": 384,
        "groups": [0, 256, 128, 0],
        "accumulate": True,
        "gap": 1,
    },
}


@by_tile
@by_cluster
@pytest.mark.parametrize("edge", EDGES)
def test_bits_of_every_tile_and_edge(tile, multicast, edge):
    """Each tile and cluster with both types of D, each edge too; not each edge of each tile with both."""
    dtype = (BF16, FP32)[(list(EDGES).index(edge) + TILES.index(tile) + list(MULTICAST).index(multicast)) % 2]
    Problem(dtype=dtype, **EDGES[edge]).must_match(tile=tile, multicast=multicast, sms=4)


@pytest.mark.parametrize("m", [0, 1, 7, 63, 64, 128, 257])
@pytest.mark.parametrize(("n", "tokens"), [(0, 128), (1, 16), (72, 576), (136, 1040), (576, 144)])
def test_bits_of_chosen_tiles(m, n, tokens):
    Problem(m, n, tokens).must_match()


ZIPF = [128 * round(9 / (rank + 1)) for rank in range(8)]
GROUPS = {
    "one": [384],
    "two_odd": [128, 256],
    "all_empty": [0] * 5,
    "one_hot": [0, 0, 640, 0],
    "experts_of_128": [128] * 8,
    "zipf": ZIPF,
    "zipf_reversed": ZIPF[::-1],
    "thirty_two": [128 * (g % 3 == 1) for g in range(32)],
}


@by_cluster
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_bits_of_groups(groups, accumulate, multicast):
    """Odd numbers of tiles in each group (2 x 3 of 64 x 128): a cluster has a surplus tile, never a foreign one."""
    problem = Problem(100, 300, sum(groups) + 256, groups, accumulate=accumulate)
    problem.must_match(tile=(64, 128), multicast=multicast, sms=4)


@pytest.mark.parametrize(("m", "n"), [(192, 384), (352, 352), (64, 129)])
def test_odd_tile_counts_of_groups(m, n):
    """DeepGEMM 415 and 429, scaled down: 192 x 3072 over [128, 256] tokens and 1408 x 1408."""
    for multicast in MULTICAST:
        Problem(m, n, 384, [128, 256]).must_match(tile=(128, 128), multicast=multicast, sms=4)


NONSENSE = {
    "descending": [0, 512, 128, 384],
    "negative": [-2147483648, -128, 256, 384],
    "past_the_end": [0, 256, 1024, 2147483647],
    "no_multiples": [1, 255, 300, 639],
    "all_wrong": [2147483647, -2147483648, 2147483647, 5],
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("offsets", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_in_offsets_means_the_whole_slices_that_exist(offsets, accumulate):
    problem = Problem(70, 140, 600, offsets=offsets, accumulate=accumulate, gap=8)
    problem.checked = 1
    problem.must_match(tile=(64, 128), multicast="b", sms=2)


def test_ring_goes_around_many_times():
    """More slices than stages, more tiles than SMs: the phase of every barrier turns several times."""
    Problem(130, 260, 2304).must_match(tile=(128, 128), multicast="b", sms=2)


def test_nan_and_infinity_stay_in_their_row_and_column():
    problem = Problem(130, 136, 300)
    problem.a[5, 7] = 0x7F  # e4m3 NaN
    problem.b[17, 299] = 0xFF
    problem.scale_a[1, 9] = torch.inf
    problem.scale_b[2, 100] = torch.nan
    assert problem.run(tile=(128, 128), multicast="b", sms=2) == ""
    result, expected = problem.of(problem.room)[0], problem.of(problem.expected)[0]
    assert result[5].isnan().all() and result[:, [17, 100]].isnan().all()
    assert not result[9].isfinite().any()
    rows = [i for i in range(130) if i not in (5, 9)]
    columns = [i for i in range(136) if i not in (17, 100)]
    assert torch.equal(result[rows][:, columns], expected[rows][:, columns])


def test_nan_of_foreign_groups_and_of_tokens_that_nobody_owns():
    problem = Problem(70, 72, 640, offsets=[128, 256, 512])
    for x in (problem.a, problem.b):
        x[:, :128] = x[:, 512:] = 0x7F
    for x in (problem.scale_a, problem.scale_b):
        x[0] = x[4] = torch.nan
    problem.must_match()
    problem.a[:, 128:256] = 0x7F
    assert problem.run() == ""
    result, expected = problem.of(problem.room), problem.of(problem.expected)
    assert result[0].isnan().all() and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("asynchrony", [EAGER, RANDOM, LAZY])
@by_cluster
@by_tile
def test_no_hazards(tile, multicast, asynchrony):
    for seed, dtype in enumerate((FP32, BF16)):
        problem = Problem(130, 264, 1152, [128, 0, 1024], accumulate=seed == 1, dtype=dtype)
        problem.checked = 1
        options = {"schedule": (2 * seed + asynchrony + 1) % 4, "seed": seed, "asynchrony": asynchrony}
        problem.must_match(tile=tile, multicast=multicast, sms=2, **options)


def test_repeats_and_tiles_give_the_same_bits():
    problem = Problem(200, 300, 512, [384, 128])
    for i in range(20):
        problem.room.fill_(7.0)
        options = {
            "tile": TILES[i % 4],
            "multicast": list(MULTICAST)[i % 3],
            "schedule": i % 4,
            "asynchrony": i % 3,
        }
        problem.must_match(sms=2 + i % 5, seed=i, **options)


def test_a_build_without_promotion_fails():
    problem = Problem(64, 128, 2048, positive=True)
    assert problem.run(drop_kind=b"promotion") == ""
    assert problem.differing() > 0


def test_offsets_of_elements_beyond_32_bits():
    """Strides that put rows, slices and groups more than 2^31 elements apart, in memory that is never touched between."""
    small = Problem(66, 40, 384, [256, 128], accumulate=True)
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which the module does not name
    room = mmap.mmap(-1, 1 << 38, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))

    def placed(x: torch.Tensor, at: int, stride: int) -> int:
        """Rows of x at `at`, `stride` bytes apart; their address."""
        for row in range(x.shape[0]):
            values = x[row].contiguous()
            ctypes.memmove(base + at + row * stride, values.data_ptr(), values.nbytes)
        return base + at

    d_at, group, row_bytes = 1 << 37, 1 << 35, 1 << 28
    for g in range(2):
        placed(small.of(small.room)[g], d_at + g * group, row_bytes)
    changes = {
        "a": placed(small.a, 0, 1 << 27), "a_stride": 1 << 27,
        "b": placed(small.b, 1 << 35, 1 << 27), "b_stride": 1 << 27,
        "scale_a": placed(small.scale_a, 1 << 36, 1 << 33), "scale_a_stride": 1 << 31,
        "scale_b": placed(small.scale_b, (1 << 36) + 4096, 1 << 33), "scale_b_stride": 1 << 31,
        "d": base + d_at, "d_stride": row_bytes // 4, "d_group_stride": group // 4,
    }  # fmt: skip
    assert small.run(tile=(64, 128), **changes) == ""
    got = torch.empty(40)
    for g, row in itertools.product(range(2), range(66)):
        ctypes.memmove(got.data_ptr(), base + d_at + g * group + row * row_bytes, got.nbytes)
        assert torch.equal(got, small.of(small.expected)[g, row])


def test_schedule_visits_every_tile_once_and_reads_only_slices_that_exist():
    source = Path(__file__).with_name("wgrad_tile_test.cpp")
    undefined = [
        *building.STRICT,
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
    ]  # sums of offsets must not overflow
    building.output_of(building.program("wgrad_tiles", [source], undefined))


# What the cost model chooses on 132 SMs: [M, N] of D by tokens, fp32; /a and /b: the cluster of two that shares A or B.
PINNED = {
    (2112, 7168, 1): "128x192 128x192",
    (24576, 1536, 1): "128x192 128x192",
    (32768, 512, 1): "128x192 128x192",
    (7168, 16384, 1): "128x192 128x192",
    (576, 7168, 1): "128x160 128x160",
    (4096, 7168, 8): "128x192 128x192",
    (7168, 2048, 32): "128x192 128x192",
    (256, 512, 1): "64x128/a 64x128/a",
    (256, 100, 1): "64x128/b 64x128/b",
    (60, 100, 1): "64x128 64x128",
}


def test_choices_for_v3_shapes_are_pinned():
    chosen = {}
    for m, n, groups in PINNED:
        problem = Problem(1, 1, 128)
        tiles = []
        for tokens in (4096, 16384):
            call = problem.call(m=m, n=n, tokens=tokens, groups=groups, sms=0, num_sms=0)
            tiles.append(library().fp8_wgrad_choice_on(ctypes.byref(call), 132).decode())
        chosen[m, n, groups] = " ".join(tiles)
    assert chosen == PINNED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": -1}, r"^m: must be in .*; got -1"),
        ({"tokens": 1 << 31}, r"^tokens: must be in .*; got 2147483648"),
        ({"groups": -1}, r"^groups: must be in .*; got -1"),
        ({"groups": 1 << 30}, r"^groups: must have fewer than 2\^31 tiles in all; got 1073741824"),
        ({"offsets": None}, r"^offsets: must not be null unless there is one group"),
        ({"a": None}, r"^a: must not be null"),
        ({"b_stride": 200}, r"^b_stride: must be at least .*; got 200"),
        ({"a_stride": 393}, r"^a_stride: must be a multiple of 16 bytes.*; got 393"),
        ({"scale_a_stride": 130}, r"^scale_a_stride: must be a multiple of 16 bytes.*; got 130"),
        ({"scale_b_stride": 4}, r"^scale_b_stride: must be at least .*; got 4"),
        ({"d_stride": 8}, r"^d_stride: must be at least .*; got 8"),
        ({"d_group_stride": 264}, r"^d_group_stride: must be at least .*; got 264"),
        ({"num_sms": -2}, r"^num_sms: must not be negative.*; got -2"),
        ({"tile_rows": 128, "tile_columns": 64}, r"^tile: must be one of \(128, 192\), .*; got \(128, 64\)"),
        ({"tile": (128, 128), "multicast": "a", "sms": 1}, r"^multicast: needs at least two"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_argument_errors(change, message):
    problem = Problem(130, 264, 384, [128, 256])
    assert re.search(message, problem.run(**change))
    assert torch.equal(problem.room, torch.full_like(problem.room, 7.0))


def test_pointer_errors():
    problem = Problem(130, 264, 384, [128, 256])
    assert re.search(r"^a: must start at a multiple of 16", problem.run(a=problem.a.data_ptr() + 8))
    wrong = problem.scale_b.data_ptr() + 4
    assert re.search(r"^scale_b: must start at a multiple of 16", problem.run(scale_b=wrong))
    wrong = problem.offsets.data_ptr() + 2
    assert re.search(r"^offsets: must be aligned", problem.run(offsets=wrong))
    assert re.search(r"^d: must be aligned", problem.run(d=problem.room.data_ptr() + 1))
    for name in ("b", "scale_a", "offsets"):
        inside = getattr(problem, name).data_ptr()
        assert re.search(r"^d: must not overlap an input", problem.run(d=inside))  # neighbours too
