"""Seconds of one optimizer step, term by term, on the rank that is slowest.

Under DualPipe the step is  (M - PP) pairs  +  PP chunks forward and backward alone  +  the bubble  +  the optimizer.
A *pair* is a forward and a backward chunk together (F&B): its communication runs beside its computation and shows only where it is
longer. The chunks alone are those of the pipeline's filling and draining: nothing hides their communication. The bubble
is the report's, (PP/2 - 1) (F&B + B - 3W). Point-to-point transfers are counted with the communication that pairs hide.
Without a pipeline there is no second chunk, and all communication shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.plan.compute import COMPUTE
from examples.plan.links import chunk_links, wire_speed
from examples.plan.plan import Plan
from examples.plan.stages import Stage

AFTER = ("gradients and weights of ZeRO-1", "optimizer")  # terms that come when the pipeline has drained


@dataclass(frozen=True)
class Step:
    """terms: seconds that add up to `seconds`. hidden: seconds of communication behind computation, not part of it."""

    terms: dict[str, float]
    hidden: dict[str, float]
    pair: float  # F&B
    forward: float  # F, alone
    backward: float  # B, alone, W included
    weight: float  # W
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", sum(self.terms.values()))


@dataclass(frozen=True)
class Chunk:
    """One stage and one micro-batch, in seconds."""

    compute: dict[str, float]  # of F and B together
    forward: float
    weight: float
    links: dict[str, float]  # as `examples.plan.links.chunk_links`

    @property
    def seconds(self) -> float:
        """F and B without communication."""
        return sum(self.compute.values())


def step_time(plan: Plan) -> Step:
    """The step of the slowest pipeline rank."""
    steps = [rank_step(plan, rank) for rank in range(max(1, plan.pp // 2))]
    return max(steps, key=lambda step: step.seconds)


def rank_step(plan: Plan, rank: int) -> Step:
    """The step as long as one pipeline rank makes it."""
    own = plan.held(rank)
    chunks = [chunk(plan, stage) for stage in own]
    n = len(chunks)  # a rank works on its stages in turn: everything below is their mean

    def mean(values: list[float]) -> float:
        return sum(values) / n

    compute = {name: mean([c.compute[name] for c in chunks]) for name in COMPUTE}
    links = {name: mean([c.links[name] for c in chunks]) for name in chunks[0].links}
    work, m = sum(compute.values()), plan.micro_batches
    forward = mean([c.forward for c in chunks]) + links["forward alone"]
    backward = work - mean([c.forward for c in chunks]) + links["backward alone"]
    weight = mean([c.weight for c in chunks])
    alone = links["forward alone"] + links["backward alone"]
    if plan.overlapped:
        communication = links["beside compute"] + links["point-to-point"]
        filled = work / (1 - plan.assumptions.overlap_loss.number) if links["beside compute"] else work
        pair = max(filled, communication)
        exposed = (m - plan.pp) * (pair - work) + plan.pp * alone
        bubble = (plan.pp // 2 - 1) * (pair + backward - 3 * weight)
        hidden = {
            "all-to-all": (m - plan.pp) * max(0.0, links["beside compute"] - (pair - work)),
            "point-to-point": m * links["point-to-point"],
        }
    else:
        pair, exposed, bubble, hidden = forward + backward, m * alone, 0.0, {}
    terms = {name: m * seconds for name, seconds in compute.items()}
    terms |= {"all-to-all, exposed": exposed, "pipeline bubble": bubble}
    terms |= _optimizer(plan, own)
    return Step(terms, hidden, pair, forward, backward, weight)


def chunk(plan: Plan, stage: Stage) -> Chunk:
    """One micro-batch on one stage."""
    times = [plan.block_time(block) for block in stage]
    return Chunk(
        {name: sum(time.terms[name] for time in times) for name in COMPUTE},
        forward=sum(time.forward for time in times),
        weight=sum(time.weight for time in times),
        links=chunk_links(plan, stage),
    )


def _optimizer(plan: Plan, own: tuple[Stage, ...]) -> dict[str, float]:
    """Reduce-scatter of FP32 gradients, all-gather of new weights (BF16), and AdamW on a shard. None of it is hidden."""
    copies = len(own)
    dense = sum(b.parameters for stage in own for b in stage)
    expert = sum(b.expert_parameters for stage in own for b in stage) / plan.layout.ep
    a, card = plan.assumptions, plan.hardware
    wire = wire_speed(plan) * a.collective.number
    exchanged = shard = 0.0
    for parameters, group in ((dense, plan.layout.dp * copies), (expert, plan.layout.replicas * copies)):
        exchanged += parameters * (1 - 1 / group)
        shard += parameters / group
    # Reads gradient, master and both moments, writes master, both moments and the new weight.
    touched = shard * (4 + 2 * 4 + 4 * plan.moments_bytes + 2)
    stream = card.hbm.number * a.stream.number
    seconds = (
        exchanged * (4 + 2) / wire,
        (touched + 4 * (dense + expert)) / stream,
    )  # the norm reads every gradient
    return dict(zip(AFTER, seconds, strict=True))
