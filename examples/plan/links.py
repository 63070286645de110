"""Bytes on the wires and the seconds they take: dispatch and combine of the experts, and the pipeline's neighbours.

A token goes once to each node that holds an expert of it (at most `top_groups` nodes, section 2.1.2) over InfiniBand, and there over
NVLink to each GPU that does (section 3.2.2). The two hops overlap, so the slower one counts. Dispatch carries FP8 rows, forward and
backward; combine carries BF16, both ways (section 3.3.3).
"""

from __future__ import annotations

from examples.plan.plan import Plan
from examples.plan.stages import Stage

_META = 12 * 8 + 8  # choices, gates and source of a row


def visited(plan: Plan) -> tuple[float, float]:
    """Expected remote nodes and remote GPUs of a token, when choices are even."""
    c, layout = plan.model, plan.layout
    nodes, node_gpus = layout.ep_nodes, layout.local
    # Groups of experts lie whole on nodes, or several nodes share one: a token then spreads over more of them.
    per_group = max(1.0, nodes / c.num_groups)
    reach = min(nodes, c.top_groups * per_group)
    reached = reach * (1 - (1 - 1 / reach) ** c.top_k) if nodes > 1 else 1.0
    remote_nodes = reached * (1 - 1 / nodes)
    gpus = reached * node_gpus
    hit = gpus * (1 - (1 - 1 / gpus) ** c.top_k)
    return remote_nodes, hit * (1 - 1 / layout.ep)


def row_bytes(plan: Plan) -> tuple[float, float]:
    """Bytes of one dispatched and one combined row."""
    d = plan.model.hidden_size
    return (d + 4 * -(-d // 128) if plan.model.precision == "fp8" else 2 * d) + _META, 2 * d


def wire_speed(plan: Plan) -> float:
    """Bytes per second between the ranks of a collective or of the pipeline: NVLink if all are in one node."""
    card = plan.hardware
    return (card.internode if plan.layout.world > card.node_size else card.nvlink).number


def chunk_links(plan: Plan, stage: Stage) -> dict[str, float]:
    """Seconds of communication of one chunk: forward and backward alone, all of it beside compute, and the neighbours."""
    a, card = plan.assumptions, plan.hardware
    routed = sum(block.routed for block in stage)
    out = {"forward alone": 0.0, "backward alone": 0.0, "beside compute": 0.0, "point-to-point": 0.0}
    wire = wire_speed(plan)
    if plan.pp > 1:  # one state forward and its gradient backward, each over the rank's own wire
        out["point-to-point"] = (
            2 * 2 * plan.model.hidden_size * plan.tokens / (wire * a.internode_alone.number)
        )
    if (
        plan.context_parallel > 1
    ):  # latents: gathered forward and again backward, their FP32 gradients reduced
        layers = sum(block.kind in ("dense", "moe", "mtp") for block in stage)
        gathered = plan.seq_len * plan.micro_batch * plan.model.latent_width * layers
        ring = wire * a.collective.number
        out["forward alone"] += 2 * gathered / ring
        out["backward alone"] += (2 + 4) * gathered / ring
        out["beside compute"] += (2 + 2 + 4) * gathered / ring
    if not routed or plan.layout.ep == 1:
        return out
    nodes, gpus = visited(plan)
    amount = routed * plan.tokens * a.rank_imbalance.number

    def seconds(row: float, share: float) -> float:
        wires = nodes * row / (card.internode.number * share)
        return amount * max(wires, gpus * row / card.nvlink.number)

    dispatch, combine = row_bytes(plan)
    alone = seconds(dispatch, a.internode_alone.number) + seconds(combine, a.internode_alone.number)
    beside = seconds(dispatch, a.dispatch_overlapped.number) + seconds(combine, a.combine_overlapped.number)
    out["forward alone"] += alone
    out["backward alone"] += alone
    out["beside compute"] += 2 * beside
    return out
