"""SwiGLU, forward and backward, with the casts of training behind it."""

from __future__ import annotations

from pathlib import Path

from ..claims import fast, steady, tested
from ..steps import Data, benchmark

ORDER = 10
SHAPES: list[tuple[int, int]] = [(4096, 2048), (32768, 2048), (8192, 18432)]  # T, I: experts, dense layers

# Share of HBM bandwidth that is claimed on inputs of 64 MB and more: research/gemm-quant.md section 7.2.
SHARES = {
    "swiglu": 0.88,
    "swiglu_quantize": 0.88,
    "swiglu_backward": 0.85,
    "swiglu_backward_quantize": 0.85,
    "swiglu_backward_quantize_fp8": 0.85,  # gate and up from their FP8 copy
    "swiglu_backward_quantize_grouped": 0.85,
}
OPS = {kernel: (kernel.removesuffix("_fp8"),) for kernel in SHARES}


def _bench(_: Path) -> Data:
    from bench import activation

    return activation.bench(SHAPES)


STEPS = [benchmark("bench-activation", 50, 180, "SwiGLU and its casts beside a plain copy", _bench)]

CLAIMS = [
    claim
    for kernel, share in SHARES.items()
    for claim in (
        tested(
            f"{kernel}.values", kernel, "Equals the model up to the device's e^x and 1/x", f"test_swiglu_values[{kernel}-"
        ),
        *steady(kernel, f"test_swiglu_repeat[{kernel}]", f"test_swiglu_graph[{kernel}]"),
        fast(kernel, "bench-activation", share),
    )
]  # fmt: skip
