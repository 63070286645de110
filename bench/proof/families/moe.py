"""The plumbing of the MoE layer: routing, balance, permutation."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, fast, faster_than, steady, tested
from ..steps import Data, benchmark

ORDER = 6
TOKENS = [4096, 16384, 65536]  # DeepSeek-V3's router and hidden size: bench/moe.py
# Share of HBM bandwidth that is claimed on inputs of 64 MB and more.
SHARES = {
    "route": 0.6,
    "route_backward": 0.7,
    "balance_loss": 0.5,
    "permute": 0.8,
    "permute_quantized": 0.8,
    "unpermute": 0.8,
    "unpermute_backward": 0.8,
}
OPS = {kernel: (kernel,) for kernel in (*SHARES, "update_bias_")}


def _bench(_: Path) -> Data:
    from bench import moe

    return moe.bench(TOKENS)


STEPS = [benchmark("bench-moe", 60, 240, "routing and permutation beside a plain copy", _bench)]


def _results(kernel: str) -> str:
    exact = kernel.startswith("permute") or kernel == "update_bias_"
    return "Equals the reference to the byte" if exact else "Equals the model up to rounding"


CLAIMS = [
    *(
        claim
        for kernel in OPS
        for claim in (
            tested(f"{kernel}.results", kernel, _results(kernel), f"test_moe_results[{kernel}-"),
            *steady(kernel, f"test_moe_repeat[{kernel}]", f"test_moe_op_graph[{kernel}]"),
        )
    ),
    *(fast(kernel, "bench-moe", share) for kernel, share in SHARES.items()),
    tested("moe.graph", "MoE layer", "A MoE layer's plumbing is captured in a CUDA graph and replays", "test_moe_graph"),
    Claim(
        "update_bias_.speed", "update_bias_", "At least as fast as PyTorch's own three operations", "bench-moe",
        faster_than("eager", 1.0, kernel="update_bias_"),
    ),
]  # fmt: skip
