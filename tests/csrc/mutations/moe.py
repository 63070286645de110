"""Mutation runs of moe."""

from __future__ import annotations

import ctypes

import torch

from tests.csrc.building import ROOT, library
from tests.csrc.mutation import Kernel, Site, sites


class MoeCall(ctypes.Structure):
    _fields_ = (
        [("operation", ctypes.c_int32)]
        + [(name, ctypes.c_int64) for name in ("tokens", "experts", "top_k", "columns")]
        + [(name, ctypes.c_void_p) for name in ("logits", "bias", "topk_idx", "cu_seqlens")]
        + [("sequences", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("rows", "scale", "source")]
        + [("out", ctypes.c_void_p * 6), ("out_bytes", ctypes.c_int64), ("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in ("asynchrony", "schedule")]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


def kernels() -> list[Kernel]:
    """Every launch of an operation in one world, so that a lost grid_dependency_wait shows."""
    names = ("route", "balance_loss", "permute", "unpermute")
    folder = ROOT / "csrc/moe"
    driver = library(
        "moe",
        [ROOT / "tests/csrc/moe/moe_driver.cpp"],
        [folder / f"{name}.cu" for name in ("route", "balance", "permute", "unpermute")],
    )
    driver.moe_on_emulator.restype = ctypes.c_char_p
    # Two steps for a warp of the plan, and bins for each of its warps.
    tokens, experts, top_k, columns, size = 48, 80, 4, 144, 1 << 16
    generator = torch.Generator().manual_seed(1)
    slots = tokens * top_k
    inputs = {
        "logits": torch.rand(tokens, experts, generator=generator),
        "bias": torch.rand(experts, generator=generator),
        "topk_idx": torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].contiguous(),
        "cu_seqlens": torch.tensor([0, 8, 8, 17], dtype=torch.int32),
        "rows": torch.randn(slots, columns, generator=generator).bfloat16(),
        "scale": torch.rand(1024, generator=generator),
        "source": torch.randperm(slots, generator=generator),
    }
    room = [torch.empty(size, dtype=torch.uint8) for _ in range(6)]

    def kernel(operation: int) -> Kernel:
        expected: list[torch.Tensor] = []

        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            for out in room:
                out.fill_(0x55)
            call = MoeCall(operation, tokens, experts, top_k, columns, sequences=3, out_bytes=size, seed=seed,
                           asynchrony=asynchrony, schedule=schedule, drop_kind=drop[0].encode(),
                           drop_site=drop[1].encode(), **{k: v.data_ptr() for k, v in inputs.items()})  # fmt: skip
            call.out[:] = [out.data_ptr() for out in room]
            report = driver.moe_on_emulator(ctypes.byref(call)).decode()
            if not expected and not report:  # bits are proved against the reference elsewhere
                expected.extend(out.clone() for out in room)
            return report or ("" if all(map(torch.equal, room, expected)) else "data")

        return Kernel(names[operation], run, lambda: sites(driver))

    return [kernel(operation) for operation in (2, 1, 3, 0)]  # the one with most steps first
