"""What is planned: a model on a cluster, in one layout, with one batch; and everything that is refused before counting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from deepseek_ops.parallel.layout import Layout, LayoutError
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.plan.compute import BlockTime, block_time
from examples.plan.hardware import EFFICIENCIES, Efficiencies, Hardware
from examples.plan.model_costs import BlockCosts, blocks
from examples.plan.stages import Stage, cut


@dataclass(frozen=True)
class Plan:
    """One run to be counted.

    batch: sequences per step, in all. micro_batch: sequences of one micro-batch. context_parallel: ranks of DP that share
    the tokens of a sequence (the report names no such split; long sequences do not fit without). moments_bytes: 2 for
    BF16 (section 3.3.3).
    """

    model: ModelConfig
    hardware: Hardware
    layout: Layout
    seq_len: int
    batch: int
    micro_batch: int = 1
    context_parallel: int = 1
    assumptions: Efficiencies = EFFICIENCIES
    moments_bytes: int = 2

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.layout.pp

    @property
    def micro_batches(self) -> int:
        """M: per pipeline and step, both directions together."""
        return self.batch * self.context_parallel // (self.layout.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """T: tokens of a micro-batch on one rank."""
        return self.micro_batch * self.seq_len // self.context_parallel

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch * self.seq_len

    @property
    def overlapped(self) -> bool:
        """Whether a forward and a backward chunk run as a pair that hides communication (DualPipe, section 3.2.1)."""
        return self.layout.schedule == "dualpipe"

    def block_time(self, block: BlockCosts) -> BlockTime:
        """One micro-batch. While communication runs beside computation it holds SMs."""
        beside = self.overlapped and self.layout.ep > 1
        return block_time(
            block,
            model=self.model,
            hardware=self.hardware,
            assumptions=self.assumptions,
            tokens=self.tokens,
            ep=self.layout.ep,
            comm_sms=self.assumptions.comm_sms.number if beside else 0,
        )

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The model, cut."""
        every = list(blocks(self.model, self.seq_len, self.context_parallel))
        return cut(every, self.pp, lambda block: self.block_time(block).seconds)

    def held(self, rank: int) -> tuple[Stage, ...]:
        """The stages of a pipeline rank."""
        return tuple(self.stages[stage] for stage in self.layout.stages(rank))


def make_plan(
    model: ModelConfig,
    hardware: Hardware,
    *,
    gpus: int,
    pp: int,
    ep: int,
    seq_len: int,
    batch: int,
    micro_batch: int = 1,
    context_parallel: int = 1,
    assumptions: Efficiencies = EFFICIENCIES,
) -> Plan:
    """Check everything that needs no counting. `UserError` names the rule and the nearest legal layout.

    The schedule is DualPipe where there is a pipeline, and one chunk after the other, nothing hidden, where there is none.
    """
    for name, value in (
        ("--gpus", gpus), ("--pp", pp), ("--ep", ep), ("--seq-len", seq_len), ("--batch", batch),
        ("--micro-batch", micro_batch), ("--context-parallel", context_parallel),
    ):  # fmt: skip
        if value < 1:
            raise UserError(f"{name}: must be at least 1; got {value}")
    try:
        layout = Layout(
            world=gpus,
            pp=pp,
            ep=ep,
            node_size=hardware.node_size,
            schedule="dualpipe" if pp > 1 else "1f1b",
            num_layers=model.num_layers,
            num_experts=model.num_experts,
        )
    except LayoutError as error:
        raise UserError(f"layout: {error}") from None
    if seq_len * micro_batch % context_parallel or layout.dp % context_parallel:
        raise UserError(
            f"--context-parallel: must divide seq_len {seq_len} and DP {layout.dp}; got {context_parallel}"
        )
    plan = Plan(model, hardware, layout, seq_len, batch, micro_batch, context_parallel, assumptions)
    quantum = layout.dp * micro_batch // context_parallel
    if batch % max(quantum, 1) or batch < quantum:
        near = max(1, round(batch / quantum)) * quantum
        raise UserError(
            f"--batch: must be a multiple of {quantum} sequences (DP {layout.dp} x micro-batch {micro_batch}"
            f" / context {context_parallel}); nearest {near}; got {batch}"
        )
    try:
        return replace(plan, layout=replace(layout, micro_batches=plan.micro_batches))
    except LayoutError as error:
        raise UserError(f"micro-batches: {error}") from None
