"""One grouped product for the driver of fp8_gemm_grouped and fp8_gemm_masked: operands, canaries, expected bits."""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path

import torch

from deepseek_ops import quantize as quant
from deepseek_ops.reference.gemm import fp8_gemm as reference
from tests.csrc import building
from tests.csrc.building import ROOT

BF16, FP32 = torch.bfloat16, torch.float32
DENSE, GROUPED, MASKED = range(3)
MULTICAST = {"none": 0, "a": 1, "b": 2}
CANARY = 7.0


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Call(ctypes.Structure):
    _fields_ = (
        _fields("a b scale_a scale_b index d", ctypes.c_void_p)
        + _fields("m n k a_stride b_stride scale_a_stride scale_b_stride d_stride", ctypes.c_int64)
        + _fields(
            "a_group_stride b_group_stride scale_a_group_stride scale_b_group_stride d_group_stride",
            ctypes.c_int64,
        )
        + _fields(
            "kind groups fp32 accumulate clear_rest num_sms tile_rows tile_columns multicast", ctypes.c_int32
        )
    )


class Run(ctypes.Structure):
    _fields_ = (
        _fields("seed", ctypes.c_uint64)
        + _fields("asynchrony schedule check", ctypes.c_int32)
        + _fields("drop_kind drop_site", ctypes.c_char_p)
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels with every access watched; a run decides whether it is checked."""
    csrc = ROOT / "csrc"
    loaded = building.library(
        "fp8_grouped",
        [csrc / "common/tile_chooser.cpp", Path(__file__).with_name("fp8_grouped_driver.cpp")],
        [csrc / f"gemm/{name}.cu" for name in ("fp8_gemm", "fp8_gemm_grouped", "fp8_gemm_masked")],
    )
    loaded.fp8_gemms_on_emulator.restype = ctypes.c_char_p
    return loaded


def run(calls: list[Call], seed=0, asynchrony=1, schedule=1, check=False, drop=("", "")) -> str:
    """The report of the calls on one stream, "" when all is well."""
    how = Run(seed, asynchrony, schedule, check, drop[0].encode(), drop[1].encode())
    array = (Call * len(calls))(*calls)
    return library().fp8_gemms_on_emulator(array, len(calls), ctypes.byref(how)).decode()


def drop_sites() -> list[tuple[str, str]]:
    """The steps of the last run that a mutation may leave out."""
    library().drop_sites.restype = ctypes.c_char_p
    return [tuple(item.split("@")) for item in library().drop_sites().decode().split()]


def _operands(quantise, shape, generator, draw):
    """Codes with rows at multiples of 16 bytes (the gap holds NaN), and scales."""
    q, scale = quantise(draw(*shape, generator=generator))
    k = shape[-1]
    room = torch.full((*shape[:-1], max(-(-k // 16) * 16, 16)), 0x7F, dtype=torch.uint8)
    room[..., :k] = q.view(torch.uint8)
    return q, room[..., :k], scale


class Problem:
    """sizes: rows of the groups (DENSE: of one). GROUPED: `first` rows before them and `spare` behind; MASKED: `room` rows for each.

    D lies in a larger buffer of canaries, `gap` elements between its rows and `offset` before the first; `expected` is
    all of that buffer after a call, which clears the rows of no group (`clear`) or leaves them.
    """

    def __init__(self, kind, sizes, n, k, dtype=BF16, first=0, spare=0, room=None, gap=0, offset=0, clear=True,
                 positive=False):  # fmt: skip
        self.kind, self.groups, self.n, self.k, self.dtype, self.clear = kind, len(sizes), n, k, dtype, clear
        self.bounds = list(itertools.accumulate(sizes, initial=first))
        self.m = (
            (max(sizes, default=0) if room is None else room) if kind == MASKED else self.bounds[-1] + spare
        )
        batch = (self.groups,) if kind == MASKED else ()
        generator = torch.Generator().manual_seed(self.m * 7 + n * 3 + k + self.groups)
        draw = torch.rand if positive else torch.randn
        codes_a, self.a, self.scale_a = _operands(_by_row, (*batch, self.m, k), generator, draw)
        codes_b, self.b, self.scale_b = _operands(
            quant.quantize_128x128, (self.groups, n, k), generator, draw
        )
        self.index = torch.tensor(sizes if kind == MASKED else self.bounds, dtype=torch.int32)
        self.stride = max(n + gap, 1)
        size = torch.empty(0, dtype=dtype).element_size()
        self.buffer = torch.full((max(self.groups, 1) * self.m * self.stride + 64,), CANARY, dtype=dtype)
        self.offset = -self.buffer.data_ptr() // size % (16 // size) + offset
        self.expected = self.buffer.clone()
        d = self.matrix(self.expected)
        if clear and d.numel():
            d.zero_()
        for g, rows in enumerate(sizes):
            at = (g, slice(0, rows)) if kind == MASKED else slice(self.bounds[g], self.bounds[g] + rows)
            scale = self.scale_a[g][:, :rows] if kind == MASKED else self.scale_a[:, at]
            if rows and n:
                self.wide = reference(codes_a[at], scale, codes_b[g], self.scale_b[g], FP32, "hopper")
                d[at] = self.wide.to(dtype)

    def matrix(self, buffer: torch.Tensor) -> torch.Tensor:
        """D within a buffer: [groups, m, n] or [m, n]."""
        matrices = self.groups if self.kind == MASKED else 1
        d = buffer[self.offset :][: matrices * self.m * self.stride].view(matrices, self.m, self.stride)
        return (d if self.kind == MASKED else d[0])[..., : self.n]

    def call(self, tile=(0, 0), multicast="none", sms=3, **changes) -> Call:
        by_group = self.kind == MASKED
        call = Call(
            a=self.a.data_ptr(), b=self.b.data_ptr(), scale_a=self.scale_a.data_ptr(), scale_b=self.scale_b.data_ptr(),
            index=self.index.data_ptr(), d=self.matrix(self.buffer).data_ptr(), m=self.m, n=self.n, k=self.k,
            a_stride=self.a.stride(-2), b_stride=self.b.stride(1),
            scale_a_stride=self.scale_a.stride(-2), scale_b_stride=self.scale_b.stride(1), d_stride=self.stride,
            a_group_stride=self.a.stride(0) if by_group else 0, b_group_stride=self.b.stride(0),
            scale_a_group_stride=self.scale_a.stride(0) if by_group else 0,
            scale_b_group_stride=self.scale_b.stride(0), d_group_stride=self.m * self.stride if by_group else 0,
            kind=self.kind, groups=self.groups, fp32=self.dtype == FP32, clear_rest=self.clear, num_sms=sms,
            tile_rows=tile[0], tile_columns=tile[1], multicast=MULTICAST[multicast] if tile[0] else -1,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(call, name, value)
        return call

    def differing(self) -> int:
        """Elements of the whole buffer that are not as expected."""
        bits = torch.int16 if self.dtype == BF16 else torch.int32
        return int((self.buffer.view(bits) != self.expected.view(bits)).sum())

    def must_match(self, tile=(0, 0), multicast="none", sms=3, **how) -> None:
        self.buffer.fill_(CANARY)
        report = run([self.call(tile, multicast, sms)], **how)
        assert report == "", report
        assert self.differing() == 0


def _by_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_1x128, of a batch one matrix after the other."""
    if x.ndim == 2:
        return quant.quantize_1x128(x)
    if x.shape[0] == 0:
        q, scale = quant.quantize_1x128(x.new_empty(x.shape[1:]))
        return q.new_empty((0, *q.shape)), scale.new_empty((0, *scale.shape))
    pieces = [quant.quantize_1x128(y) for y in x]
    return torch.stack([q.view(torch.uint8) for q, _ in pieces]).view(pieces[0][0].dtype), torch.stack(
        [s for _, s in pieces]
    )
