"""The same step played by the event simulator of DualPipe, with each stage's own times instead of the report's formula.

A second opinion on `step`: the formula takes the mean of a rank's two stages and lets every rank fill the pipeline alike.
"""

from __future__ import annotations

from deepseek_ops.parallel.dualpipe.costs import Costs, Link
from deepseek_ops.parallel.dualpipe.generate import generate
from deepseek_ops.parallel.dualpipe.simulate import simulate
from examples.errors import UserError
from examples.plan.plan import Plan
from examples.plan.step import chunk, rank_step


def pipeline_seconds(plan: Plan, latency: float = 0.0) -> float:
    """Seconds from the first chunk to the last, without the optimizer. latency: of a send that nothing hides."""
    if not plan.overlapped:
        raise UserError(f"simulated: needs a pipeline; got PP {plan.pp}")
    chunks = [chunk(plan, stage) for stage in plan.stages]
    pairs = [rank_step(plan, rank).pair for rank in range(plan.pp // 2)]
    costs = Costs(
        forward=[c.forward + c.links["forward alone"] for c in chunks],
        backward=[c.seconds - c.forward + c.links["backward alone"] for c in chunks],
        weight=[c.weight for c in chunks],
        pair=sum(pairs) / len(pairs),
    )
    timeline = simulate(generate("dualpipe", plan.pp, plan.micro_batches), costs, Link(latency))
    return max(spans[-1].end for spans in timeline.spans)
