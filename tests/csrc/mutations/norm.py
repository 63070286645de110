"""Mutation runs of norm."""

from __future__ import annotations

import ctypes

from tests.csrc.building import ROOT, library
from tests.csrc.mutation import Kernel
from tests.csrc.mutations._calls import c_kernel, normal


class NormCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "other", "dy", "weight", "rstd")]
        + [("out", ctypes.c_void_p * 4)]
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "parts")]
        + [("operation", ctypes.c_int32), ("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def kernels() -> list[Kernel]:
    """Rows of several warps; two blocks that each go on with more rows; a second kernel behind the first."""
    driver = library(
        "norm",
        [ROOT / "tests/csrc/norm/norm_driver.cpp"],
        [ROOT / "csrc/norm/rms_norm.cu", ROOT / "csrc/norm/rms_norm_backward.cu"],
    )
    rows, columns = 37, 1040
    x, other, dy = (normal(i, rows, columns).bfloat16() for i in range(3))
    weight, rstd = normal(3, columns), normal(4, rows).abs()
    inputs = [t.data_ptr() for t in (x, other, dy, weight, rstd)]

    def kernel(name: str, operation: int) -> Kernel:
        def call_of(out: list[int], options: tuple[object, ...]) -> NormCall:
            _ = x, other, dy, weight, rstd  # stay alive
            room = (ctypes.c_void_p * 4)(*out[:3], out[3])
            return NormCall(*inputs, room, rows, columns, 2, operation, *options)

        return c_kernel(name, driver, "norm_on_emulator", 4, 2 if operation else -1, call_of)

    return [kernel("rms_norm_backward", 1), kernel("rms_norm_residual_quantize", 0)]
