"""Two questions about the SM, asked by timing bench/probes/micro.cu on every SM at once.

They decide tile shapes and schedules (research/gemm-quant.md section 9); no claim rests on them, so they have no
verdict, only figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builds import build
from .measure import ClockLog, clock_reader, percentile
from .probes import Case, Library

SOURCE_BYTES = 4 * 16384
PORT = {
    "1x64x128": (0, 1, 128),
    "1x64x256": (1, 1, 256),
    "2x64x128": (2, 2, 128),
    "2x64x192": (3, 2, 192),
    "2x64x256": (4, 2, 256),
}
PHASE = {"together": 5, "half a slice apart": 6, "second partial": 7}


def one(library: Library, variant: int, blocks: int, slices: int, copies: int, launches: int) -> float:
    """Milliseconds of one launch."""
    source = np.zeros(SOURCE_BYTES, np.uint8)
    outputs = {"sink": np.zeros(blocks * 384, np.float32), "ms": np.zeros(1, np.float32)}
    answer = library.run(Case("micro", (variant, blocks, slices, copies, launches), (source,), outputs))
    return float(answer["ms"][0])


def _measure(
    variant: int, groups: int, n: int, copies: int, slices: int = 4096, launches: int = 20
) -> dict[str, Any]:
    import torch

    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    library = Library(build("micro.cu", "cuda"))
    log = ClockLog(clock_reader())
    with log():
        times = [one(library, variant, blocks, slices, copies, launches) for _ in range(5)]
    ms = percentile(times, 0.5)
    flops = 2.0 * 64 * groups * n * 128 * slices * blocks
    clocks = log.summary()
    result = {
        "ms": ms,
        "runs": times,
        "tflops": round(1e-9 * flops / ms, 1),
        "copies_per_slice": copies,
        "clocks": clocks,
    }
    mhz = clocks.get("sm_mhz", {}).get("median")
    if mhz:
        per_clock = flops / blocks / (ms * 1e3 * mhz)
        result["tensor_utilisation"] = round(per_clock / 8192, 4)  # 8192 FP8 FLOP a clock and SM
        operands = groups * (64 * 128 + n * 128) + copies * 16384
        result["smem_bytes_per_clock"] = round(operands * slices / (ms * 1e3 * mhz), 1)
    return result


def smem_port() -> dict[str, Any]:
    """Each tile without copies and with as many as a GEMM of that tile has, rounded up to 16 KiB."""
    figures = []
    for name, (variant, groups, n) in PORT.items():
        for copies in (0, -(-(groups * 64 + n) * 128 // 16384)):
            figures.append({"tile": name, **_measure(variant, groups, n, copies)})
    alone = {f["tile"]: f["ms"] for f in figures if f["copies_per_slice"] == 0}
    costs = {f["tile"]: round(f["ms"] / alone[f["tile"]], 3) for f in figures if f["copies_per_slice"]}
    return {"figures": figures, "time_with_copies": costs, "summary": f"with copies {costs}"}


def phase() -> dict[str, Any]:
    """128 x 128 tiles with promotion, three schedules."""
    figures = {name: _measure(variant, 2, 128, 0) for name, variant in PHASE.items()}
    rates = {name: figure["tflops"] for name, figure in figures.items()}
    return {
        "figures": figures,
        "summary": ", ".join(f"{name} {rate} TFLOP/s" for name, rate in rates.items()),
    }


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {"smem-port": smem_port, "phase": phase}
