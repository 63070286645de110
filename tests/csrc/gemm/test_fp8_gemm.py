"""fp8_gemm's own source on the CPU: bit for bit the `hopper` reference, for every tile, cluster and edge."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from deepseek_ops import quantize as quant
from deepseek_ops.reference.gemm import fp8_gemm as reference

from .dense_library import dense_library

BF16, FP32 = torch.bfloat16, torch.float32
TILES = [
    (256, 128),
    (128, 256),
    (128, 192),
    (128, 160),
    (128, 128),
    (128, 112),
    (128, 96),
    (64, 128),
    (64, 256),
]
MULTICAST = {"none": 0, "a": 1, "b": 2}
EAGER, RANDOM, LAZY = range(3)

by_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
by_cluster = pytest.mark.parametrize("multicast", MULTICAST)


class Call(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("a", "b", "scale_a", "scale_b", "d")]
        + [
            (name, ctypes.c_int64)
            for name in (
                "m",
                "n",
                "k",
                "a_stride",
                "b_stride",
                "scale_a_stride",
                "scale_b_stride",
                "d_stride",
            )
        ]
        + [
            (name, ctypes.c_int32)
            for name in ("fp32", "accumulate", "num_sms", "tile_rows", "tile_columns", "multicast")
        ]
        + [("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


@pytest.fixture(scope="module")
def plain() -> ctypes.CDLL:
    return dense_library("fp8_gemm", checked=False)


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return dense_library("fp8_gemm", checked=True)


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """The same rows at strides of whole 16 bytes, the gap filled with what must never be read."""
    rows, columns = x.shape
    room = torch.full((max(rows, 1), -(-max(columns, 1) // multiple) * multiple), 0x7F, dtype=x.dtype)
    room[:rows, :columns] = x
    return room[:rows, :columns]


class Problem:
    """Operands of one product, D with canaries around and between its rows, and the expected bits of all of it."""

    def __init__(self, m, n, k, dtype=BF16, accumulate=False, gap=0, offset=0, positive=False):
        generator = torch.Generator().manual_seed(m * 7 + n * 3 + k)
        draw = torch.rand if positive else torch.randn
        rows = draw(m, k, generator=generator) * torch.randn(m, 1, generator=generator).mul(2).exp()
        a, self.scale_a = quant.quantize_1x128(rows)
        b, self.scale_b = quant.quantize_128x128(draw(n, k, generator=generator))
        self.a, self.b = padded(a.view(torch.uint8), 16), padded(b.view(torch.uint8), 16)
        self.m, self.n, self.k, self.accumulate, self.dtype = m, n, k, accumulate, dtype
        self.stride = max(n + gap, 1)
        self.room = torch.full((max(m, 1) * self.stride + 64,), 7.0, dtype=dtype)
        size = self.room.element_size()
        self.first = -self.room.data_ptr() // size % (16 // size) + offset
        old = torch.randn(m, n, generator=generator).to(dtype)
        if accumulate:
            self.rows_of(self.room).copy_(old)
        self.expected = self.room.clone()
        if m and n:
            exact = reference(a, self.scale_a, b, self.scale_b, FP32, "hopper")
            self.rows_of(self.expected).copy_(old.float() + exact if accumulate else exact)

    def rows_of(self, room: torch.Tensor) -> torch.Tensor:
        return room[self.first :][: self.m * self.stride].view(self.m, self.stride)[:, : self.n]

    def run(self, library, tile=(0, 0), multicast="none", sms=3, seed=0, asynchrony=RANDOM, **changes):
        call = Call(
            a=self.a.data_ptr(), b=self.b.data_ptr(),
            scale_a=self.scale_a.data_ptr(), scale_b=self.scale_b.data_ptr(),
            d=self.room.data_ptr() + self.first * self.room.element_size(),
            m=self.m, n=self.n, k=self.k,
            a_stride=self.a.stride(0), b_stride=self.b.stride(0),
            scale_a_stride=self.scale_a.stride(0), scale_b_stride=self.scale_b.stride(0),
            d_stride=self.stride, fp32=self.dtype == FP32, accumulate=self.accumulate, num_sms=sms,
            tile_rows=tile[0], tile_columns=tile[1], multicast=MULTICAST[multicast],
            seed=seed, asynchrony=asynchrony, schedule=1, check=self.checked,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(call, name, value)
        return library.fp8_gemm_on_emulator(ctypes.byref(call)).decode()

    checked = 0

    def differing(self) -> int:
        bits = torch.int16 if self.dtype == BF16 else torch.int32
        return int((self.room.view(bits) != self.expected.view(bits)).sum())

    def must_match(self, library, **options) -> None:
        report = self.run(library, **options)
        assert report == "", report
        assert self.differing() == 0


# Ragged on every side; more tiles than SMs; a tail of K; no K at all; odd strides and an odd base.
EDGES = {
    "ragged": {"m": 130, "n": 264, "k": 272},
    "padded_rows": {"m": 65, "n": 200, "k": 144, "accumulate": True, "gap": 8},
    "odd_columns": {"m": 3, "n": 33, "k": 128},
    "no_k": {"m": 129, "n": 136, "k": 0, "accumulate": True},
    "odd_stride": {"m": 200, "n": 300, "k": 96, "accumulate": True, "gap": 1, "offset": 1},
}


@by_tile
@by_cluster
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("edge", EDGES)
def test_bits_of_every_tile_and_edge(plain, tile, multicast, dtype, edge):
    Problem(dtype=dtype, **EDGES[edge]).must_match(plain, tile=tile, multicast=multicast, sms=4)


@pytest.mark.parametrize("m", [0, 1, 7, 63, 64, 128, 257])
@pytest.mark.parametrize(("n", "k"), [(0, 128), (8, 16), (72, 576), (136, 1040), (576, 144)])
def test_bits_of_chosen_tiles(plain, m, n, k):
    Problem(m, n, k).must_match(plain)


def test_ring_goes_around_many_times(plain):
    """More slices than stages, more tiles than SMs: the phase of every barrier turns several times."""
    Problem(130, 260, 2304, FP32).must_match(plain, tile=(128, 128), multicast="b", sms=2)


def test_nan_and_infinity_stay_in_their_row(plain):
    problem = Problem(130, 136, 300, FP32)
    problem.a[5, 7] = 0x7F  # e4m3 NaN
    problem.scale_a[1, 9] = torch.inf
    assert problem.run(plain, tile=(128, 128), multicast="b", sms=2) == ""
    result, expected = problem.rows_of(problem.room), problem.rows_of(problem.expected)
    assert result[5].isnan().all()
    assert not result[9].isfinite().any()
    others = [row for row in range(130) if row not in (5, 9)]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("asynchrony", [EAGER, RANDOM, LAZY])
@by_cluster
@pytest.mark.parametrize("tile", [(128, 112), (256, 128), (64, 256)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_no_hazards(checked, tile, multicast, asynchrony):
    for seed in range(2):
        problem = Problem(130, 264, 400, accumulate=seed == 1)
        problem.checked = 1
        problem.must_match(checked, tile=tile, multicast=multicast, sms=2, seed=seed, asynchrony=asynchrony)


def test_repeats_and_tiles_give_the_same_bits(plain):
    results = set()
    for tile, multicast, sms, seed in [
        ((128, 128), "none", 1, 0),
        ((128, 192), "a", 4, 1),
        ((64, 256), "b", 2, 2),
    ]:
        problem = Problem(200, 300, 400, FP32)
        assert problem.run(plain, tile=tile, multicast=multicast, sms=sms, seed=seed) == ""
        results.add(problem.room.numpy().tobytes())
    assert len(results) == 1


def test_a_build_without_promotion_fails(plain):
    problem = Problem(64, 128, 2048, FP32, positive=True)
    assert problem.run(plain, drop_kind=b"promotion") == ""
    assert problem.differing() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": -1}, r"^m: must be in .*; got -1"),
        ({"k": 1 << 31}, r"^k: must be in .*; got 2147483648"),
        ({"a": None}, r"^a: must not be null"),
        ({"b_stride": 200}, r"^b_stride: must be at least .*; got 200"),
        ({"a_stride": 280}, r"^a_stride: must be a multiple of 16 bytes.*; got 280"),
        ({"scale_a_stride": 130}, r"^scale_a_stride: must be a multiple of 16 bytes.*; got 130"),
        ({"d_stride": 8}, r"^d_stride: must be at least .*; got 8"),
        ({"num_sms": -2}, r"^num_sms: must not be negative.*; got -2"),
        ({"tile_rows": 128, "tile_columns": 64}, r"^tile: must be one of \(256, 128\), .*; got \(128, 64\)"),
        ({"tile": (128, 128), "multicast": "a", "sms": 1}, r"^multicast: needs at least two"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_argument_errors(plain, change, message):
    problem = Problem(130, 264, 272)
    assert re.search(message, problem.run(plain, **change))
    assert torch.equal(problem.room, torch.full_like(problem.room, 7.0))


def test_pointer_errors(plain):
    problem = Problem(130, 264, 272)
    assert re.search(r"^a: must start at a multiple of 16", problem.run(plain, a=problem.a.data_ptr() + 8))
    assert re.search(r"^d: must be aligned", problem.run(plain, d=problem.room.data_ptr() + 1))
    assert re.search(r"^d: must not overlap an input.*; got b", problem.run(plain, d=problem.b.data_ptr()))
