"""What a plan amounts to: throughput, MFU, days and dollars; and the report's own run, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from examples.configs import cluster, get_config
from examples.configs.schedules import CONTEXT_PHASES, TOTAL_TOKENS, TRILLION
from examples.plan.hardware import EFFICIENCIES, Efficiencies, get_hardware
from examples.plan.memory import memory
from examples.plan.model_costs import totals
from examples.plan.plan import Plan, make_plan
from examples.plan.step import Step, step_time


@dataclass(frozen=True)
class Result:
    """One plan, counted. `tokens`: of the whole run."""

    plan: Plan
    step: Step
    memory: dict[str, float]
    tokens: float

    @property
    def bytes(self) -> float:
        """Of the fullest GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has the memory."""
        return self.bytes <= self.plan.hardware.memory.number

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.plan.step_tokens / self.step.seconds / self.plan.layout.world

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s per GPU: forward and backward of the main model, causal attention, nothing counted that is
        repeated (recomputation) or that inference does not need (MTP)."""
        return self.tokens_per_gpu * totals(self.plan.model, self.plan.seq_len).flops_per_token

    @property
    def mfu_bf16(self) -> float:
        """`flops_per_gpu` over the dense BF16 peak."""
        return self.flops_per_gpu / self.plan.hardware.bf16.number

    @property
    def mfu_fp8(self) -> float:
        """`flops_per_gpu` over the dense FP8 peak."""
        return self.flops_per_gpu / self.plan.hardware.fp8.number

    @property
    def hours(self) -> float:
        """GPU hours of the whole run."""
        return self.tokens / self.tokens_per_gpu / 3600

    @property
    def hours_per_trillion(self) -> float:
        """GPU hours per 10^12 tokens."""
        return TRILLION / self.tokens_per_gpu / 3600

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.hours / self.plan.layout.world / 24


def count(plan: Plan, tokens: float) -> Result:
    """Step and memory of a plan; does not refuse what is too large (`Result.fits` says so)."""
    return Result(plan, step_time(plan), memory(plan), tokens)


@dataclass(frozen=True)
class Comparison:
    """One published figure beside the planner's."""

    what: str
    reported: float
    planned: float
    unit: str

    @property
    def error(self) -> float:
        """Relative."""
        return self.planned / self.reported - 1


def the_report(assumptions: Efficiencies = EFFICIENCIES) -> tuple[Result, list[Result], list[Comparison]]:
    """The report's run: pre-training, the two phases of longer context, and its bill beside ours.

    In the phases of long context every 4K tokens of a sequence have a GPU of their own (8 and 32 of DP share a sequence);
    the report does not say how it was done. Post-training is the report's number: nothing published tells its tokens.
    """
    model = get_config("v3_671b").model
    common: dict[str, Any] = {
        "gpus": cluster.GPUS,
        "pp": cluster.PIPELINE_PARALLEL,
        "ep": cluster.EXPERT_PARALLEL,
        "assumptions": assumptions,
    }
    card, length = get_hardware(cluster.HARDWARE), get_config("v3_671b").data.seq_len
    batch = get_config("v3_671b").train.schedule.batch_size.end
    main = count(make_plan(model, card, seq_len=length, batch=batch, **common), TOTAL_TOKENS)
    phases = [
        count(
            make_plan(
                model,
                card,
                seq_len=phase.sequence_length,
                batch=phase.batch_size,
                context_parallel=phase.sequence_length // length,
                **common,
            ),
            phase.tokens,
        )
        for phase in CONTEXT_PHASES
    ]
    context = sum(phase.hours for phase in phases)
    post = cluster.POST_TRAINING_HOURS
    days = main.hours_per_trillion / cluster.GPUS / 24
    bill = [
        Comparison("pre-training, per trillion tokens", cluster.HOURS_PER_TRILLION, main.hours_per_trillion, "H800 hours"),
        Comparison("a trillion tokens on 2048 H800", cluster.DAYS_PER_TRILLION, days, "days"),
        Comparison("pre-training, 14.8T tokens", cluster.PRETRAINING_HOURS, main.hours, "H800 hours"),
        Comparison("context extension to 32K and 128K", cluster.CONTEXT_HOURS, context, "H800 hours"),
        Comparison("post-training (the report's number)", post, post, "H800 hours"),
        Comparison("in total", cluster.TOTAL_HOURS, main.hours + context + post, "H800 hours"),
    ]  # fmt: skip
    return main, phases, bill
