"""Kernels that a C function of a driver runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from tests.csrc.mutation import Kernel, Site, sites


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def c_kernel(
    name: str,
    driver: ctypes.CDLL,
    entry: str,
    outputs: int,
    workspace: int,
    call_of: Callable[..., ctypes.Structure],
) -> Kernel:
    """One C call, `call_of(outputs, options)`, with its outputs compared with those of the unchanged kernel."""
    getattr(driver, entry).restype = ctypes.c_char_p
    expected: list[torch.Tensor] = []

    def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
        out = [torch.full((200_000,), 0x55, dtype=torch.uint8) for _ in range(outputs)]
        options = (seed, asynchrony, schedule, 1, drop[0].encode(), drop[1].encode())
        call = call_of([t.data_ptr() for t in out], options)
        report: str = getattr(driver, entry)(ctypes.byref(call)).decode()
        results = [t for i, t in enumerate(out) if i != workspace]
        if not expected and not report:  # bits are proved against the reference elsewhere
            expected.extend(results)
        return report or ("" if all(map(torch.equal, results, expected)) else "data")

    return Kernel(name, run, lambda: sites(driver))
