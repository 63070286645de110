"""Quantisers to e4m3 and E5M6, and what is done with codes: turns, and the way back to values."""

from __future__ import annotations

from pathlib import Path

from ..claims import fast, steady, tested
from ..steps import Data, benchmark

ORDER = 7
SHAPES: list[tuple[int, int]] = [(4096, 7168), (16384, 7168), (65536, 2048)]  # T, H

# Share of HBM bandwidth that is claimed on inputs of 64 MB and more: research/gemm-quant.md section 7.2.
QUANTISERS = {
    "quantize_1x128": 0.88,
    "quantize_128x1": 0.88,
    "quantize_128x1_grouped": 0.85,
    "quantize_1x128_128x1": 0.88,
    "quantize_1x128_128x1_grouped": 0.85,
    "quantize_128x128": 0.88,
}
CODED = {  # ops on codes, and to E5M6
    "pack_e5m6": 0.88,
    "pack_e5m6_row": 0.88,
    "unpack_e5m6": 0.88,
    "requantize_e5m6_128x1": 0.80,
    "requantize_e5m6_128x1_grouped": 0.80,
    "requantize_128x1": 0.80,
    "requantize_128x1_grouped": 0.80,
    "transpose_128x128": 0.85,
    "dequantize_1x128": 0.88,
    "dequantize_128x1": 0.80,
    "dequantize_128x128": 0.88,
}
SHARES = {**QUANTISERS, **CODED}
OPS = {kernel: (kernel.removesuffix("_row"),) for kernel in SHARES}


def _bench(_: Path) -> Data:
    from bench import quantize

    return quantize.bench(SHAPES)


STEPS = [benchmark("bench-quantize", 90, 240, "quantisers beside a plain copy", _bench, priority=3)]

CLAIMS = [
    claim
    for kernel, share in SHARES.items()
    for claim in (
        tested(f"{kernel}.bytes", kernel, "Bytes and scales equal the reference on every special value",
               f"test_quantiser_bytes[{kernel}-")
        if kernel in QUANTISERS
        else tested(f"{kernel}.bytes", kernel, "Bits equal the reference, special values included",
                    f"test_coded_bytes[{kernel}-"),
        *steady(kernel, f"test_quantize_repeat[{kernel}]", f"test_quantize_graph[{kernel}]"),
        fast(kernel, "bench-quantize", share),
    )
]  # fmt: skip
