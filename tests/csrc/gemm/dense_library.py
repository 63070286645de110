"""A dense GEMM's own source on the CPU, behind its C face."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from tests.csrc import building
from tests.csrc.building import ROOT


@functools.cache
def dense_library(name: str, checked: bool) -> ctypes.CDLL:
    """Emulator, kernel and NAME_driver.cpp; the kernel with every access watched, or plain, which runs faster."""
    host = [ROOT / "csrc/common/tile_chooser.cpp", Path(__file__).with_name(f"{name}_driver.cpp")]
    kernels = [ROOT / f"csrc/gemm/{name}.cu"]
    if checked:
        loaded = building.library(f"{name}_checked", host, kernels)
    else:
        loaded = building.library(f"{name}_plain", [*host, *kernels])
    getattr(loaded, f"{name}_on_emulator").restype = ctypes.c_char_p
    return loaded
