"""The fused linear cross entropy on a Hopper GPU beside the unfused formula: DeepSeek-V3's output head.

    python -m bench.loss [--json FILE]

Loss and both gradients of T tokens, hidden 7168, 129280 classes, bf16, on random data with a cold L2. Baseline: eager
PyTorch, `F.cross_entropy(F.linear(h, w).float(), labels)` and its backward pass, where its logits fit. Floor: four products
(logits twice, but for one chunk; dh; dweight) of 2 T V D FLOP. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import deepseek_ops
from bench.proof.measure import compare
from deepseek_ops import loss as ops
from deepseek_ops._registry import absent_reason
from deepseek_ops.reference.modelled.loss import classes_of_chunk

WIDTH, CLASSES, CHUNK = 7168, 129280, 256
TOKENS = (512, 4096, 8192)
FLOP_PER_CLOCK = 4096 * 132


def floor_us(tokens: int, gigahertz: float = 1.755) -> float:
    """Microseconds of tensor cores that no version of this schedule can beat on an H100 SXM."""
    once = classes_of_chunk(tokens, CLASSES, CHUNK) / CLASSES  # the share of the logits that is made once
    products = 4 - min(once, 1.0)
    return 1e-3 * products * 2 * tokens * WIDTH * CLASSES / (FLOP_PER_CLOCK * gigahertz)


def row_of(tokens: int) -> dict[str, Any]:
    h = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16) * 0.1
    weight = torch.randn(CLASSES, WIDTH, device="cuda", dtype=torch.bfloat16) * 0.1
    labels = torch.randint(0, CLASSES, (tokens,), device="cuda")
    kept: dict[str, Any] = {}

    def ours() -> None:
        with deepseek_ops.backend("cuda"):
            kept["ours"] = ops._sum.plain(h, weight, labels, CHUNK, True, True)

    def eager() -> None:
        x, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
        total = F.cross_entropy(F.linear(x, w).float(), labels, reduction="sum")
        kept["eager"] = (total.detach(), *torch.autograd.grad(total, (x, w)))

    timed = compare({"ours": ours, "eager": eager})
    result = timed["ours"]
    if "median_us" in result:
        result["tflops"] = round(
            1e-6 * 6 * tokens * WIDTH * CLASSES / result["median_us"], 2
        )  # three useful products
        exact = torch.logsumexp((h[:32].float() @ weight.float().T).double(), 1)
        label = (h[:32].double() * weight[labels[:32]].double()).sum(1)
        with deepseek_ops.backend("cuda"):
            some = ops._tokens.plain(h[:32], weight, labels[:32], CHUNK).double()
        result["correct"] = bool((some - (exact - label)).abs().max() < 1e-3)
    return {"kernel": "linear_cross_entropy", "shape": f"{tokens}x{WIDTH}x{CLASSES}", "candidates": timed}


def bench() -> dict[str, Any]:
    """A step of the proof."""
    rows = [row_of(tokens) for tokens in TOKENS]
    parts = []
    for row in rows:
        mine, theirs = row["candidates"]["ours"], row["candidates"]["eager"]
        if "median_us" not in mine:
            return {"rows": rows, "summary": f"ours absent: {mine.get('absent', '')}"}
        ratio = f" {theirs['median_us'] / mine['median_us']:.2f}x" if "median_us" in theirs else ""
        parts.append(f"{row['shape']} {mine['median_us'] / 1000:.1f} ms{ratio}")
    return {"rows": rows, "summary": "; ".join(parts)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print(f"{'tokens':>8} {'classes at a time':>18} {'floor ms':>10}   (H100 SXM, 1.755 GHz)")
    for tokens in TOKENS:
        print(f"{tokens:>8} {classes_of_chunk(tokens, CLASSES, CHUNK):>18} {floor_us(tokens) / 1000:>10.1f}")
    reason = absent_reason("cuda")
    if reason:
        print(f"no GPU to measure on: {reason}")
        return
    result = bench()
    print(result["summary"])
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
