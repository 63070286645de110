"""Cross entropy fused with the output head's product."""

from __future__ import annotations

from pathlib import Path

from ..claims import Claim, faster_than, tested
from ..steps import Data, benchmark

ORDER = 5
OPS = {
    "linear_cross_entropy": (
        "linear_cross_entropy",
        "linear_cross_entropy_tokens",
        "linear_cross_entropy_tokens_backward",
    )
}

WIDTH, CLASSES, CHUNK = 7168, 129280, 256
TOKENS = [512, 4096, 8192]


def _bench(_: Path) -> Data:
    from bench import loss

    return loss.bench()


STEPS = [benchmark("bench-loss", 40, 180, "fused linear cross entropy beside the unfused formula", _bench)]

CLAIMS = [
    *(
        tested(f"loss.{name}", "linear_cross_entropy", text, f"linear_cross_entropy_{name}")
        for name, text in (
            ("values", "Loss and gradients equal the model up to the device's exp, ln and 1/x"),
            ("repeat", "Twenty repeats are bitwise equal"),
            ("graph", "A launch is captured in a CUDA graph and replays on new data"),
        )
    ),
    Claim(
        "loss.speed", "linear_cross_entropy", "Forward and gradients at least as fast as PyTorch's unfused formula",
        "bench-loss", faster_than("eager", 1.0, "eager"),
    ),
]  # fmt: skip
