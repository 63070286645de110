"""One call of bf16_gemm without bindings: operands in foreign memory, D among canaries, and the expected bits of it all."""

from __future__ import annotations

import ctypes
import itertools

import torch

from deepseek_ops.reference.tensor_core import tensor_core_accumulate

BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
NONE, ROWS_BY_OFFSETS, ROWS_BY_MASK, K_BY_OFFSETS, K_BY_MASK = range(5)
MULTICAST = {"none": 0, "a": 1, "b": 2}
EAGER, RANDOM, LAZY = range(3)

_POINTERS = ("a", "b", "d", "index")
_SIZES = (
    *("m", "n", "k", "groups", "a_row", "a_k", "a_matrix", "b_row", "b_k", "b_matrix", "d_row", "d_matrix"),
)
_FLAGS = (
    *("a_matrices", "b_matrices", "d_matrices", "index_size", "fp32", "accumulate", "clear", "grouping"),
    *("num_sms", "tile_rows", "tile_columns", "multicast"),
)


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _FLAGS),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")),
        *((name, ctypes.c_char_p) for name in ("drop_kind", "drop_site")),
    )


def stored(x: torch.Tensor, major: str) -> torch.Tensor:
    """x [..., rows, k] with k ("k") or rows ("mn") contiguous, at strides of whole 16 bytes, NaN in the gaps."""
    if major == "mn":
        return stored(x.mT, "k").mT
    *lead, rows, columns = x.shape
    room = torch.full((*lead, max(rows, 1), -(-max(columns, 1) // 8) * 8 + 8), NAN, dtype=BF16)
    view = room[..., :rows, :columns]
    view.copy_(x)
    return view


class Problem:
    """`index` are offsets or counts. Rows or K that belong to no group are NaN in the operands."""

    checked = 0

    def __init__(
        self, m, n, k, majors="kk", dtype=BF16, accumulate=False, grouping=NONE, index=None, clear=False,
        gap=0, offset=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(m * 7 + n * 3 + k)
        groups = 1 if index is None else len(index) - (grouping in (ROWS_BY_OFFSETS, K_BY_OFFSETS))
        masked = grouping in (ROWS_BY_MASK, K_BY_MASK)
        a_lead = (groups,) if masked else ()
        b_lead = (groups,) if masked or grouping == ROWS_BY_OFFSETS else ()
        self.d_lead = (groups,) if masked or grouping == K_BY_OFFSETS else ()
        a = torch.randn(*a_lead, m, k, generator=generator).to(BF16)
        b = torch.randn(*b_lead, n, k, generator=generator).to(BF16)
        self.m, self.n, self.k, self.groups, self.grouping = m, n, k, groups, grouping
        self.dtype, self.accumulate, self.clear = dtype, accumulate, clear
        self.index = None if index is None else torch.tensor(index, dtype=torch.int32)

        self.stride = max(n + gap, 1)
        self.matrix = m * self.stride + gap
        matrices = self.d_lead[0] if self.d_lead else 1
        self.room = torch.full((max(matrices * self.matrix, 1) + 64,), 7.0, dtype=dtype)
        size = self.room.element_size()
        self.first = -self.room.data_ptr() // size % (16 // size) + offset
        old = torch.randn(*self.d_lead, m, n, generator=generator).to(dtype)
        self.rows_of(self.room).copy_(old)
        self.expected = self.room.clone()
        d = self.rows_of(self.expected)
        ranges = self._ranges(index)
        if grouping in (ROWS_BY_OFFSETS, ROWS_BY_MASK):
            owned = torch.zeros(*self.d_lead, m, dtype=torch.bool)
            for g, (start, stop) in enumerate(ranges):
                rows = (g, slice(start, stop)) if masked else slice(start, stop)
                d[rows] = tensor_core_accumulate(a[rows], b[g]).to(dtype)
                owned[rows] = True
            a[~owned] = NAN
            if clear:
                d[~owned] = 0
        elif grouping in (K_BY_OFFSETS, K_BY_MASK):
            owned = torch.zeros(*a_lead, k, dtype=torch.bool)
            for g, (start, stop) in enumerate(ranges):
                span = slice(start, stop)
                left, right = (a[g], b[g]) if masked else (a, b)
                (owned[g] if masked else owned)[span] = True
                if start < stop or not accumulate:
                    self._store(d[g], tensor_core_accumulate(left[:, span], right[:, span]))
            a.mT[~owned], b.mT[~owned] = NAN, NAN
        else:
            self._store(d, tensor_core_accumulate(a, b))
        self.a, self.b = (
            stored(a, "k" if majors[0] == "k" else "mn"),
            stored(b, "k" if majors[1] == "k" else "mn"),
        )

    def _ranges(self, index):
        if self.grouping in (ROWS_BY_OFFSETS, K_BY_OFFSETS):
            return list(itertools.pairwise(index))
        return [(0, count) for count in index or ()]

    def _store(self, d, value):
        d.copy_(d.float() + value if self.accumulate else value)

    def rows_of(self, room: torch.Tensor) -> torch.Tensor:
        shape, strides = (*self.d_lead, self.m, self.n), (self.matrix, self.stride, 1)
        return torch.as_strided(room, shape, strides[-len(shape) :], self.first)

    def run(self, library, tile=(0, 0), multicast="none", sms=3, seed=0, asynchrony=RANDOM, **changes):
        strides = {}
        for name, x in (("a", self.a), ("b", self.b)):
            *matrix, row, k = x.stride()
            strides |= {f"{name}_row": row, f"{name}_k": k, f"{name}_matrix": matrix[0] if matrix else 0}
            strides[f"{name}_matrices"] = x.shape[0] if matrix else 1
        call = Call(
            a=self.a.data_ptr(), b=self.b.data_ptr(),
            d=self.room.data_ptr() + self.first * self.room.element_size(),
            index=None if self.index is None else self.index.data_ptr(),
            index_size=0 if self.index is None else self.index.numel(),
            m=self.m, n=self.n, k=self.k, groups=self.groups, **strides,
            d_row=self.stride, d_matrix=self.matrix, d_matrices=self.d_lead[0] if self.d_lead else 1,
            fp32=self.dtype == FP32, accumulate=self.accumulate, clear=self.clear, grouping=self.grouping,
            num_sms=sms, tile_rows=tile[0], tile_columns=tile[1], multicast=MULTICAST[multicast],
            seed=seed, asynchrony=asynchrony, schedule=1, check=self.checked,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(call, name, value)
        return library.bf16_gemm_on_emulator(ctypes.byref(call)).decode()

    def differing(self) -> int:
        bits = torch.int16 if self.dtype == BF16 else torch.int32
        return int((self.room.view(bits) != self.expected.view(bits)).sum())

    def must_match(self, library, **options) -> None:
        report = self.run(library, **options)
        assert report == "", report
        assert self.differing() == 0
