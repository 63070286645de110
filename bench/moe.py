"""The kernels of the MoE layer's plumbing on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.moe [--quick] [--only WORDS] [--json FILE]

The shapes are DeepSeek-V3's: 256 experts in 8 groups of which 4 are open, 8 experts a token, hidden size 7168; measured as
in bench/quantize.py. The floor is what any version must read and write once; a token's row is read once and written 8
times. Results are compared with the reference on fewer tokens. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.proof import memory_bound
from bench.proof.families.moe import OPS as KERNELS
from bench.proof.memory_bound import Case
from bench.proof.rows import Call, command, on, tensors
from bench.proof.steps import Data
from deepseek_ops import moe, quantize
from deepseek_ops._registry import OPS

EXPERTS, GROUPS, TOP_GROUPS, TOP_K, HIDDEN = 256, 8, 4, 8, 7168
SEQUENCE = 4096  # tokens, for the balance loss
TOKENS = (128, 4096, 16384, 65536)
SAMPLE = 1000


def arguments(kernel: str, tokens: int, device: str) -> tuple[Any, ...]:
    """What the op of `kernel` takes, on random data."""
    logits = torch.randn(tokens, EXPERTS, device=device)
    bias = torch.zeros(EXPERTS, device=device)
    router = (logits, bias, TOP_K, GROUPS, TOP_GROUPS, 2.5, True)
    if kernel == "route":
        return router
    topk_idx, weight, scores, counts = moe._route(*router)
    match kernel:
        case "route_backward":
            return torch.randn_like(weight), torch.randn_like(scores), scores, topk_idx, 2.5, True
        case "balance_loss":
            length = min(SEQUENCE, tokens)
            bounds = [*range(0, tokens, length), tokens]
            return scores, topk_idx, torch.tensor(bounds, dtype=torch.int32).to(device), 1e-4, "biased"
        case "update_bias_":
            return bias, counts, 0.001
    x = torch.randn(tokens, HIDDEN, device=device).to(torch.bfloat16)
    match kernel:
        case "permute":
            return x, topk_idx, EXPERTS
        case "permute_quantized":
            return *quantize.quantize_1x128(x, pow2=True), topk_idx, EXPERTS
    y, _, source = moe._permute(x, topk_idx, EXPERTS)
    match kernel:
        case "unpermute":
            return y, source, tokens, TOP_K, weight
        case "unpermute_backward":
            return x, y, source, TOP_K, weight
    raise KeyError(kernel)


def difference(got: Any, want: Any) -> str:
    """What is wrong with a result, "" if nothing: codes and offsets to the byte, floats up to rounding, and choices
    but for one in a thousand, where two scores are neighbours and the device's sigmoid is not torch's."""
    for index, (a, b) in enumerate(zip(tensors(got), tensors(want), strict=True)):
        if a.dtype == torch.int64 and a.ndim == 2:
            if (a == b).double().mean() < 0.999:
                return f"output {index}: other experts"
        elif a.is_floating_point() and a.element_size() > 1:
            error = (a.double() - b.double()).abs().mean() / b.double().abs().mean().clamp_min(1e-30)
            if not error < 2e-3:
                return f"output {index}: mean error {error:.1e} of the mean"
        elif a.dtype != torch.int64 and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return f"output {index} differs"
    return ""


def updated(bias: Tensor, counts: Tensor, speed: float) -> Tensor:
    """`update_bias_` of a copy."""
    return moe.update_bias_(bias.clone(), counts, speed=speed)


def _eager(*given: Any) -> dict[str, Call]:
    return {"eager": on("reference", lambda: moe._update_bias_(*given))}


def case(kernel: str, tokens: int) -> Case:
    """A kernel on so many tokens."""
    draw, sample = (partial(arguments, kernel, count) for count in (tokens, min(tokens, SAMPLE)))
    if kernel == "update_bias_":
        return Case(
            kernel, f"{tokens}", OPS[kernel], draw, sample, pure=updated, moved=16 * EXPERTS, baselines=_eager
        )
    return Case(kernel, f"{tokens}", OPS[kernel], draw, sample, differs=difference)


def cases(quick: bool) -> list[Case]:
    """Every op on every number of tokens."""
    return [case(kernel, tokens) for kernel in KERNELS for tokens in (TOKENS[:3:2] if quick else TOKENS)]


def bench(tokens: Sequence[int]) -> Data:
    """A step of the proof; the bias does not know how many tokens there were."""
    return memory_bound.bench(
        case(kernel, count)
        for count in tokens
        for kernel in KERNELS
        if kernel != "update_bias_" or count == tokens[0]
    )


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.moe", __doc__, cases, memory_bound.measure, memory_bound.floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
