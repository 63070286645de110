"""RMSNorm with what stands around it: residual addition, quantisation, the backward pass."""

from __future__ import annotations

from pathlib import Path

from ..claims import fast, steady, tested
from ..steps import Data, benchmark

ORDER = 9
SHAPES: list[tuple[int, int]] = [
    (4096, 7168),
    (16384, 7168),
    (65536, 1536),
]  # T, D: hidden, and the query's latent

# Share of HBM bandwidth that is claimed on inputs of 64 MB and more: research/gemm-quant.md section 7.2.
SHARES = {
    "rms_norm": 0.88,
    "rms_norm_residual": 0.88,
    "rms_norm_quantize": 0.88,
    "rms_norm_residual_quantize": 0.88,
    "rms_norm_backward": 0.85,
}
OPS = {kernel: (kernel,) for kernel in SHARES}


def _bench(_: Path) -> Data:
    from bench import norm

    return norm.bench(SHAPES)


STEPS = [benchmark("bench-norm", 40, 150, "RMSNorm, alone and fused, beside a plain copy", _bench)]

CLAIMS = [
    claim
    for kernel, share in SHARES.items()
    for claim in (
        tested(
            f"{kernel}.values",
            kernel,
            "Equals the model up to the device's 1/sqrt",
            f"test_norm_values[{kernel}-",
        ),
        *steady(kernel, f"test_norm_repeat[{kernel}]", f"test_norm_graph[{kernel}]"),
        fast(kernel, "bench-norm", share),
    )
]
