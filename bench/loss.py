"""The fused linear cross entropy on a Hopper GPU beside the unfused formula: DeepSeek-V3's output head.

    python -m bench.loss [--quick] [--only WORDS] [--json FILE]

Loss and both gradients of T tokens, hidden 7168, 129280 classes, bf16, on random data with a cold L2. Baseline: eager
PyTorch, `F.cross_entropy(F.linear(h, w).float(), labels)` and its backward pass, where its logits fit. Floor: four products
(logits twice, but for one chunk; dh; dweight) of 2 T V D FLOP. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import deepseek_ops
from bench.proof.families.loss import CHUNK, CLASSES, TOKENS, WIDTH
from bench.proof.measure import compare
from bench.proof.rows import BF16_FLOP, BOOST_GHZ, MULTIPROCESSORS, Floor, Row, add_rates, command, step
from bench.proof.steps import Data
from deepseek_ops import loss as ops
from deepseek_ops.reference.modelled.loss import classes_of_chunk


@dataclass(frozen=True)
class Case:
    """The output head on so many tokens."""

    tokens: int

    @property
    def shape(self) -> str:
        """As a ledger has it."""
        return f"{self.tokens}x{WIDTH}x{CLASSES}"

    @property
    def name(self) -> str:
        """For people."""
        return f"linear_cross_entropy {self.shape}"


def floor_us(case: Case, sms: int = MULTIPROCESSORS) -> Floor:
    """Microseconds of tensor cores that no version of this schedule can beat."""
    tokens = case.tokens
    once = classes_of_chunk(tokens, CLASSES, CHUNK) / CLASSES  # the share of the logits that is made once
    products = 4 - min(once, 1.0)
    return {"flops": 1e-3 * products * 2 * tokens * WIDTH * CLASSES / (BF16_FLOP * sms * BOOST_GHZ)}


def measure(case: Case) -> Row:
    """Loss and both gradients, ours and eager PyTorch's."""
    tokens = case.tokens
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
    add_rates(timed, flop=6 * tokens * WIDTH * CLASSES)  # three useful products
    result = timed["ours"]
    if "median_us" in result:
        exact = torch.logsumexp((h[:32].float() @ weight.float().T).double(), 1)
        label = (h[:32].double() * weight[labels[:32]].double()).sum(1)
        with deepseek_ops.backend("cuda"):
            some = ops._tokens.plain(h[:32], weight, labels[:32], CHUNK).double()
        result["correct"] = bool((some - (exact - label)).abs().max() < 1e-3)
    return {
        "kernel": "linear_cross_entropy", "shape": case.shape, "floor_us": floor_us(case), "candidates": timed,
    }  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """The proof's, or the smallest."""
    return [Case(tokens) for tokens in TOKENS[: 1 if quick else None]]


def bench() -> Data:
    """A step of the proof."""
    return step([measure(case) for case in cases(quick=False)])


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.loss", __doc__, cases, measure, floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
