"""Mutation runs of quantise."""

from __future__ import annotations

import ctypes

import torch

from tests.csrc.building import ROOT, library
from tests.csrc.mutation import Kernel, Site, sites


class QuantizeCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "q", "q_t", "scale", "scale_t")]
        + [("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("operation", ctypes.c_int32)]
        + [("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def kernels() -> list[Kernel]:
    names = ("quantize_rows", "quantize_columns", "quantize_blocks")
    folder = ROOT / "csrc/quantize"
    driver = library(
        "quantize",
        [ROOT / "tests/csrc/quantize/quantize_driver.cpp"],
        [folder / f"{name}.cu" for name in names],
    )
    driver.quantize_on_emulator.restype = ctypes.c_char_p

    def kernel(operation: int) -> Kernel:
        rows, columns = 200, 272
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(operation)).bfloat16()
        expected: list[torch.Tensor] = []

        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            out = [torch.full((100_000,), 0x55, dtype=torch.uint8) for _ in range(4)]
            call = QuantizeCall(
                x.data_ptr(), *(t.data_ptr() for t in out), rows, columns, operation, seed, asynchrony, schedule, 1,
                drop[0].encode(), drop[1].encode(),
            )  # fmt: skip
            report = driver.quantize_on_emulator(ctypes.byref(call)).decode()
            if not expected and not report:  # bytes are proved against the reference elsewhere
                expected.extend(out)
            return report or ("" if all(map(torch.equal, out, expected)) else "data")

        return Kernel(names[operation], run, lambda: sites(driver))

    return [kernel(operation) for operation in (1, 2, 0)]  # the one with most steps first
