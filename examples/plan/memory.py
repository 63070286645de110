"""Bytes per GPU, item by item, of the rank that holds most.

Parameters lie as the report has them: FP8 Linears twice in FP8 (one copy for Fprop, its transpose for Dgrad), the
rest in BF16, gradients in FP32 (section 3.3.1). ZeRO-1 shards master weights and moments over all copies of a parameter:
DP, and under DualPipe the mirrored rank too. (`deepseek_ops.parallel.zero` keeps the FP32 masters of FP8 weights whole on each
rank and gathers 4 bytes of them: 4 bytes a parameter more than here, until it gathers FP8 copies.) Activations are `examples.model.memory`'s bytes, which tests measure.
"""

from __future__ import annotations

from dataclasses import replace

from examples.model.memory import kept_per_token
from examples.plan.model_costs import BlockCosts
from examples.plan.plan import Plan
from examples.plan.stages import Stage

_FP8_COPIES = 2  # of each weight that computes in FP8; each copy has 4 bytes of scales per 128 x 128
_SCALES = 1 + 4 / 128**2
_ROW = 1 + 4 / 128  # bytes per value of an FP8 row with its FP32 scales


def memory(plan: Plan) -> dict[str, float]:
    """Bytes by item, on the fullest rank."""
    return max(
        (rank_memory(plan, rank) for rank in range(max(1, plan.pp // 2))), key=lambda m: sum(m.values())
    )


def rank_memory(plan: Plan, rank: int) -> dict[str, float]:
    """Bytes by item on one pipeline rank."""
    own = plan.held(rank)
    a, copies = plan.assumptions, len(own)
    dense = sum(b.parameters for stage in own for b in stage)
    fp8 = sum(b.fp8_parameters for stage in own for b in stage)
    expert = sum(b.expert_parameters for stage in own for b in stage) / plan.layout.ep
    bf16 = dense - fp8
    expert_bytes = _FP8_COPIES * _SCALES if plan.model.precision == "fp8" else 2
    shards = plan.layout.dp * copies, plan.layout.replicas * copies
    sharded = dense / shards[0] + expert / shards[1]
    items = {
        "weights": fp8 * _FP8_COPIES * _SCALES + bf16 * 2 + expert * expert_bytes,
        "gradients, FP32": 4 * (dense + expert),
        "master weights, FP32, sharded": 4 * sharded,
        "moments, sharded": 2 * plan.moments_bytes * sharded,
        "activations": _activations(plan, own),
        "workspace of a layer and the logits": _workspace(plan, own),
        "communication buffers": _buffers(plan),
        "runtime": a.runtime_bytes.number,
    }
    items["fragmentation"] = a.fragmentation.number * sum(items.values())
    return items


def kept(plan: Plan, block: BlockCosts) -> float:
    """Bytes per token that a block keeps for backward, the rows received for its experts included."""
    c, d = plan.model, plan.model.hidden_size
    if block.kind in ("embedding", "head"):
        return 8 if block.kind == "embedding" else 2 * 2 * d + 8
    of_layer = sum(kept_per_token(c, dense=not block.routed).values())
    if block.routed and plan.layout.ep > 1:
        row = d * _ROW if c.precision == "fp8" else 2 * d
        alone = kept_per_token(c)["rows of the routed experts"]  # counted there when experts are local
        of_layer += c.top_k * row * plan.assumptions.rank_imbalance.number - alone
    # MTP: two states before their norms, two FP8 inputs of the projection, the state before the head's norm.
    return of_layer + (d * (4 + 2 * _ROW + 4) if block.kind == "mtp" else 0)


def _activations(plan: Plan, own: tuple[Stage, ...]) -> float:
    chunks = sorted((sum(kept(plan, b) for b in stage) * plan.tokens for stage in own), reverse=True)
    if not plan.overlapped:
        return chunks[0]
    # DualPipe holds PP + 1 chunks at its peak (table 2): the odd one may be of the larger stage.
    return chunks[0] * (plan.pp // 2 + 1) + chunks[1] * (plan.pp // 2)


def _workspace(plan: Plan, own: tuple[Stage, ...]) -> float:
    """A layer made again in BF16 and as much for its gradients; logits in BF16 where there is a head."""
    c = replace(plan.model, precision="bf16", recompute=False)
    kinds = {block.routed for stage in own for block in stage if block.kind in ("dense", "moe", "mtp")}
    layer = max((sum(kept_per_token(c, dense=not routed).values()) for routed in kinds), default=0)
    logits = any(block.kind == "head" for stage in own for block in stage)
    return plan.tokens * (2 * layer + (2 * c.vocab_size if logits else 0))


def _buffers(plan: Plan) -> float:
    """One dispatch (FP8) and one combine (BF16) in flight, and two states to and from each pipeline neighbour."""
    c, d = plan.model, plan.model.hidden_size
    total = 0.0
    if plan.layout.ep > 1:
        total += c.top_k * plan.assumptions.rank_imbalance.number * (_ROW + 2) * d
    if plan.pp > 1:
        total += 2 * 2 * 2 * d
    return total * plan.tokens
