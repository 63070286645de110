"""Seconds that one block's kernels take on one GPU, from its FLOPs and bytes and the shares of the peaks that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

from examples.model.config import ModelConfig
from examples.plan.hardware import Efficiencies, Hardware
from examples.plan.model_costs import BlockCosts

COMPUTE = ("FP8 GEMM", "BF16 GEMM", "attention", "memory-bound kernels")


@dataclass(frozen=True)
class BlockTime:
    """Seconds: terms of F and B together, and of F and of W alone."""

    terms: dict[str, float]
    forward: float
    weight: float

    @property
    def seconds(self) -> float:
        """F and B."""
        return sum(self.terms.values())


def block_time(
    block: BlockCosts,
    *,
    model: ModelConfig,
    hardware: Hardware,
    assumptions: Efficiencies,
    tokens: float,
    ep: int,
    comm_sms: float,
) -> BlockTime:
    """One block, `tokens` tokens, forward and backward.

    ep: ranks that share out the experts; comm_sms: SMs that communication holds meanwhile. A model that is not FP8 runs all
    its products at the rates of BF16.
    """
    a, share, fp8 = assumptions, 1 - comm_sms / hardware.sms.number, model.precision == "fp8"
    bf16, hbm = hardware.bf16.number * share, hardware.hbm.number
    half_rate = bf16 * a.bf16_gemm.number

    def rate(efficiency: float) -> float:
        return hardware.fp8.number * share * efficiency if fp8 else half_rate

    uneven = a.rank_imbalance.number if block.routed and ep > 1 else 1.0
    dense, grouped = tokens * (block.fp8_dense + block.repeated), tokens * block.fp8_grouped * uneven
    product = dense / rate(a.fp8_dense.number) + grouped / rate(a.fp8_grouped.number)
    wgrad = (dense + grouped) / rate(a.fp8_wgrad.number)
    if block.kind != "embedding":  # every weight's FP32 gradient is read and written
        wgrad += 8 * (block.parameters + block.expert_parameters / ep) / (hbm * a.stream.number)
    again = tokens * block.recomputed / rate(a.fp8_dense.number)
    half = tokens * block.bf16 / half_rate
    attention = tokens * block.attention / (bf16 * a.attention_forward.number)
    attention_back = tokens * block.attention_backward / (bf16 * a.attention_backward.number)
    moved = tokens * (1 + (uneven - 1) * block.memory_routed) / (hbm * a.memory_bound.number)
    move, move_back = moved * block.memory_forward, moved * block.memory_backward
    gemm = 2 * product + wgrad + again
    terms = (
        gemm if fp8 else 0.0,
        3 * half + (0.0 if fp8 else gemm),
        attention + attention_back,
        move + move_back,
    )
    return BlockTime(
        dict(zip(COMPUTE, terms, strict=True)),
        forward=product + half + attention + move,
        weight=wgrad + half,
    )
