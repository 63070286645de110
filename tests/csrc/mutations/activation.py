"""Mutation runs of activation."""

from __future__ import annotations

import ctypes

import torch

from tests.csrc.building import ROOT, library
from tests.csrc.mutation import Kernel
from tests.csrc.mutations._calls import c_kernel, normal


class ActivationCall(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("gate_up", "dy", "weight", "offsets")]
        + [("out", ctypes.c_void_p * 9)]
        + [(name, ctypes.c_int64) for name in ("rows", "inner", "groups", "padded_rows")]
        + [("operation", ctypes.c_int32), ("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule", "check")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def kernels() -> list[Kernel]:
    names = ("swiglu", "swiglu_backward", "swiglu_backward_quantize")
    driver = library(
        "activation",
        [ROOT / "tests/csrc/activation/activation_driver.cpp"],
        [ROOT / f"csrc/activation/{name}.cu" for name in names],
    )
    offsets = torch.tensor([3, 40, 40, 135], dtype=torch.int32)

    def kernel(operation: int) -> Kernel:
        rows, inner = 140 if operation == 2 else 21, 128 if operation == 2 else 656
        gate_up, dy = normal(1, rows, 2 * inner).bfloat16(), normal(2, rows, inner).bfloat16()
        weight = normal(3, rows)

        def call_of(out: list[int], options: tuple[object, ...]) -> ActivationCall:
            inputs = [t.data_ptr() for t in (gate_up, dy, weight, offsets)]
            return ActivationCall(
                *inputs, (ctypes.c_void_p * 9)(*out), rows, inner, 3, 384, operation, *options
            )

        return c_kernel(names[operation], driver, "activation_on_emulator", 9, 8, call_of)

    return [kernel(operation) for operation in (2, 1, 0)]
