"""AdamW over lists of tensors, with FP8 copies of weights, and the gradient norm that clips."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, bandwidth_at_least, steady, tested
from ..steps import Data, benchmark

ORDER = 8
OPS = {kernel: (kernel,) for kernel in ("adamw_", "adamw_quantize_", "clip_grad_norm")}

# One MoE layer's tensors (report 4.2): MLA projections, norms, router, shared expert, and 4 routed experts of the GPU.
_ATTENTION = [
    (1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384), (7168,), (1536,), (512,), (7168,),
]  # fmt: skip
_EXPERT = [(4096, 7168), (7168, 2048)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "layer": [*_ATTENTION, (256, 7168), *_EXPERT * 5],
    "small": [(7168,)] * 240,  # norms of 60 layers: launches of 58 tensors, bound by latency
    "shard": [(400_000_003,)],  # a ZeRO-1 shard, flat, of odd length
}


def _bench(_: Path) -> Data:
    from bench import optimizer

    return optimizer.bench(SHAPES)


STEPS = [
    benchmark("bench-optimizer", 30, 120, "AdamW and the gradient norm beside a plain copy and torch's fused AdamW", _bench)
]  # fmt: skip

CLAIMS = [
    tested("adamw_.bits", "adamw_", "Equals the reference bit for bit", "test_adamw_bits"),
    *steady("adamw_", "test_adamw_repeat", "test_adamw_graph"),
    Claim(
        "adamw_.speed", "adamw_", "At least 90 % of HBM bandwidth on a layer's parameters", "bench-optimizer",
        bandwidth_at_least("adamw_", 0.90),
    ),
    tested(
        "adamw_quantize_.bits", "adamw_quantize_", "Equals adamw_, quantize_128x128 and transpose_128x128 bit for bit",
        "test_adamw_with_copies_bits",
    ),
    *steady("adamw_quantize_", "test_adamw_with_copies_repeat", "test_adamw_with_copies_graph"),
    Claim(
        "adamw_quantize_.speed", "adamw_quantize_", "At least 85 % of HBM bandwidth on a layer's parameters",
        "bench-optimizer", bandwidth_at_least("adamw_quantize_", 0.85),
    ),
    tested("clip_grad_norm.bits", "clip_grad_norm", "Equals the reference's fp64 norm, rounded once", "test_clip_bits"),
    *steady("clip_grad_norm", "test_clip_repeat", "test_clip_graph"),
    Claim(
        "clip_grad_norm.speed", "clip_grad_norm", "At least 90 % of HBM bandwidth on a layer's gradients",
        "bench-optimizer", bandwidth_at_least("clip_grad_norm", 0.90),
    ),
]  # fmt: skip
