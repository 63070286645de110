"""Where the experts live: the load balancer of report section 3.4, with redundant experts.

    placement = rebalance_experts(load, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)
    placement = rebalance_with_few_moves(new_load, placement.physical_to_logical, num_groups=8, num_nodes=4, num_gpus=32)
    slots = physical_topk(topk_idx, placement.logical_to_physical[layer], placement.replica_count[layer])

Experts that many tokens choose get several replicas ("physical experts"), and replicas are packed on GPUs so that all
carry about the same load. Everything here is arithmetic on small tables on the CPU, once in some minutes; only
`physical_topk` runs in a forward pass. `python -m deepseek_ops.parallel.eplb` shows what it gives on a skewed load.

`rebalance_experts` makes the placements of the algorithm that DeepSeek published (github.com/deepseek-ai/EPLB), replica
by replica, for the same loads. Where that algorithm leaves ties to an unstable sort, equal loads go in order of index.
It starts from nothing each time; `rebalance_with_few_moves` starts from what is in memory, because 44 MB of FP8
weights per moved expert cost more than the last per cent of balance (`_eplb_moves`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import check_tensor, fail, require
from ._eplb_moves import few_moves, moved_on_gpus

__all__ = [
    "Placement",
    "gpu_load",
    "imbalance",
    "moved_experts",
    "physical_topk",
    "rebalance_experts",
    "rebalance_with_few_moves",
]


class Placement(NamedTuple):
    """Experts on slots. Slot s lies on GPU ``s // (num_replicas / num_gpus)``; GPUs of a node are consecutive.

    - physical_to_logical: int64 [L, num_replicas], the expert in each slot;
    - logical_to_physical: int64 [L, E, X], the slots of each expert, then -1; X is the largest replica count;
    - replica_count: int64 [L, E], at least 1.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    replica_count: Tensor


def rebalance_experts(
    load: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Place ``num_replicas`` replicas of the experts of each layer on ``num_gpus`` GPUs.

    load: [L, E], any real dtype, on any device; tokens per expert, measured or predicted, not negative, finite
    (also their sums in fp32, the precision of all comparisons here). num_groups: groups of node-limited routing.

    If ``num_groups`` is a multiple of ``num_nodes``, the policy is hierarchical, which section 3.4.1 uses for
    prefilling: groups are packed on nodes, an equal number on each; every node replicates its own experts; replicas
    are packed on the GPUs of the node. A token then still visits at most ``top_groups`` nodes. Else the policy is
    global (decoding, 3.4.2): the same with one group on one node. Both give every GPU ``num_replicas / num_gpus`` slots.

    Packing is greedy: the heaviest item next, into the lightest pack that has room. A new replica goes to the expert
    with the highest load per replica, which minimises that highest load. Ties go to the lower index. Two replicas of
    one expert may meet on one GPU; the published algorithm does not forbid it.

    `ArgumentError` if num_replicas is below E or no multiple of num_gpus; in hierarchical mode also if num_groups does
    not divide E or num_nodes does not divide num_gpus.
    """
    load = _check_load(load)
    layers, experts = load.shape
    num_groups, num_nodes = _check_layout(experts, num_replicas, num_groups, num_nodes, num_gpus)

    # Node-major order of the experts: groups move as a whole.
    size = experts // num_groups
    group_place = _pack(load.view(layers, num_groups, size).sum(-1), num_nodes)
    place = (group_place[:, :, None] * size + torch.arange(size)).view(layers, experts)
    on_node = _inverse(place)  # expert at each node-major place

    per_node = experts // num_nodes
    node_load = load.gather(1, on_node).view(layers * num_nodes, per_node)
    local, rank, count = _replicate(node_load, num_replicas // num_nodes)

    slot = _pack((node_load / count).gather(1, local), num_gpus // num_nodes)
    at_slot = _inverse(slot)
    local, rank = local.gather(1, at_slot), rank.gather(1, at_slot)

    first = torch.arange(num_nodes)[None, :, None] * per_node
    order = (local.view(layers, num_nodes, -1) + first).view(layers, num_replicas)
    physical = on_node.gather(1, order)
    count = count.view(layers, experts).gather(1, place)
    return _placement(physical, rank.view(layers, num_replicas), count)


def rebalance_with_few_moves(
    load: Tensor,
    current: Tensor,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    tolerance: float = 0.05,
) -> Placement:
    """A placement for ``load`` that changes ``current`` little.

    current: int64 [L, num_replicas], the experts in memory (``physical_to_logical``), every expert at least once.
    tolerance: the most loaded GPU of each layer carries at most (1 + tolerance) times what it would carry after
    `rebalance_experts`, or what it carries now if that is less.

    Replicas change GPU one by one, the best gain per move first, until the bound holds; the other candidate is the
    placement of `rebalance_experts` with its nodes and GPUs named so that most stays, from which unneeded moves are
    taken back. The one with fewer moves wins, so there are never more than `rebalance_experts` needs under its best
    names. It is a search, not a proof that no smaller number exists: tests compare it with brute force.

    No two replicas of an expert are brought together on a GPU by the one-by-one search. In hierarchical mode groups stay whole on nodes. A slot
    whose expert stays on its GPU is not touched; nothing moves in a layer that keeps the bound already. Errors as `rebalance_experts`.
    """
    load = _check_load(load)
    layers, experts = load.shape
    check_tensor("current", current, dtype=torch.int64, ndim=2)
    require(
        current.shape[0] == layers, "current", f"must have {layers} layers, as load has", current.shape[0]
    )
    require(0 <= tolerance < float("inf"), "tolerance", "must be finite and not negative", tolerance)
    current = current.cpu()
    replicas = current.shape[1]
    best = rebalance_experts(load, replicas, num_groups, num_nodes, num_gpus)
    num_groups, num_nodes = _check_layout(experts, replicas, num_groups, num_nodes, num_gpus)
    require(
        bool(((current >= 0) & (current < experts)).all()),
        "current",
        f"must hold experts from 0 to {experts - 1}",
        (current.min().item(), current.max().item()) if current.numel() else current.shape,
    )
    counts = torch.zeros(layers, experts, dtype=torch.int64).scatter_add_(
        1, current, torch.ones_like(current)
    )
    if not bool((counts > 0).all()):
        layer, expert = (counts == 0).nonzero()[0].tolist()
        fail("current", "must hold every expert at least once", f"layer {layer} without expert {expert}")
    rows = [
        few_moves(*rows, num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus, tolerance=tolerance)
        for rows in zip(load.double().numpy(), current.numpy(), best.physical_to_logical.numpy(), strict=True)
    ]
    physical = torch.from_numpy(np.stack(rows)) if rows else current.clone()
    return _from_physical(physical, experts)


def gpu_load(load: Tensor, placement: Placement, num_gpus: int) -> Tensor:
    """Load of each GPU, float64 [L, num_gpus], when an expert's tokens are shared evenly by its replicas."""
    load = _check_load(load).double()
    physical, count = placement.physical_to_logical.cpu(), placement.replica_count.cpu()
    require(
        num_gpus >= 1 and physical.shape[1] % num_gpus == 0,
        "num_gpus",
        f"must divide the {physical.shape[1]} slots",
        num_gpus,
    )
    share = (load / count).gather(1, physical)
    return share.view(share.shape[0], num_gpus, -1).sum(-1)


def imbalance(load: Tensor, placement: Placement, num_gpus: int) -> Tensor:
    """Load of the most loaded GPU over the mean, float64 [L]; 1 is perfect, and also without any load."""
    loads = gpu_load(load, placement, num_gpus)
    mean = loads.mean(1)
    return torch.where(mean > 0, loads.amax(1) / mean.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def moved_experts(before: Tensor, after: Tensor, num_gpus: int) -> Tensor:
    """Experts whose weights some GPU does not have yet, int64 [L], counted once for each such GPU.

    before, after: int64 [L, num_replicas], the experts of each slot. Another slot of the same GPU is no move.
    """
    check_tensor("before", before, dtype=torch.int64, ndim=2)
    check_tensor("after", after, dtype=torch.int64, shape=before.shape)
    require(
        num_gpus >= 1 and before.shape[1] % num_gpus == 0,
        "num_gpus",
        f"must divide the {before.shape[1]} slots",
        num_gpus,
    )
    pairs = zip(before.cpu().numpy(), after.cpu().numpy(), strict=True)
    return torch.tensor([moved_on_gpus(old, new, num_gpus) for old, new in pairs], dtype=torch.int64)


def physical_topk(topk_idx: Tensor, logical_to_physical: Tensor, replica_count: Tensor) -> Tensor:
    """The slot that serves each choice, int64 [T, K], on the device of ``topk_idx``; -1 stays -1.

    topk_idx: int64 [T, K], experts or -1. logical_to_physical: int64 [E, X], replica_count: int64 [E], of one layer.
    Which replica serves a token is a hash of the token's row, so that it repeats exactly and neighbours, which
    often choose the same experts, go to different replicas.
    """
    check_tensor("topk_idx", topk_idx, dtype=torch.int64, ndim=2)
    check_tensor(
        "logical_to_physical", logical_to_physical, dtype=torch.int64, ndim=2, device=topk_idx.device
    )
    experts, width = logical_to_physical.shape
    check_tensor("replica_count", replica_count, dtype=torch.int64, shape=(experts,), device=topk_idx.device)
    expert = topk_idx.clamp_min(0)
    row = torch.arange(topk_idx.shape[0], device=topk_idx.device)[:, None]
    hashed = (row * 2654435761 % 2**32) >> 15  # Knuth's multiplier; the low bits of a product are poor
    replica = hashed % replica_count[expert]
    return torch.where(topk_idx < 0, -1, logical_to_physical.flatten()[expert * width + replica])


def _check_load(load: Tensor) -> Tensor:
    load = check_tensor("load", load, ndim=2)
    require(not load.is_complex(), "load", "must be real", load.dtype)
    require(load.shape[1] >= 1, "load", "must have at least one expert", tuple(load.shape))
    load = load.detach().float().cpu()
    require(
        bool((load >= 0).all()),
        "load",
        "must not be negative or NaN",
        load.min().item() if load.numel() else 0,
    )
    require(
        bool(load.sum(-1).isfinite().all()),
        "load",
        "must have finite sums in fp32",
        load.amax().item() if load.numel() else 0,
    )
    return load


def _check_layout(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[int, int]:
    """Refuse what cannot be placed; groups and nodes of the policy: (1, 1) where it is global."""
    for name, value in (("num_groups", groups), ("num_nodes", nodes), ("num_gpus", gpus)):
        require(value >= 1, name, "must be at least 1", value)
    require(replicas >= experts, "num_replicas", f"must be at least the {experts} experts", replicas)
    require(replicas % gpus == 0, "num_replicas", f"must be a multiple of num_gpus = {gpus}", replicas)
    if groups % nodes:
        return 1, 1
    require(experts % groups == 0, "num_groups", f"must divide the {experts} experts", groups)
    require(gpus % nodes == 0, "num_nodes", f"must divide num_gpus = {gpus}", nodes)
    return groups, nodes


def _pack(load: Tensor, packs: int) -> Tensor:
    """Greedy packing of [R, n] items, n / packs to a pack: the place of each item, ``pack * n / packs + order``.

    All rows advance together: n steps of a few tensor ops, not R n steps of Python.
    """
    rows, items = load.shape
    room = items // packs
    if room == 1:  # the published algorithm leaves single items where they are
        return torch.arange(items).repeat(rows, 1)
    order = load.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order)
    total = torch.zeros(rows, packs)
    filled = torch.zeros(rows, packs, dtype=torch.int64)
    for item in order.split(1, dim=1):
        lightest = total.masked_fill(filled == room, float("inf")).argmin(1, keepdim=True)
        place.scatter_(1, item, lightest * room + filled.gather(1, lightest))
        total.scatter_add_(1, lightest, load.gather(1, item))
        filled.scatter_add_(1, lightest, torch.ones_like(lightest))
    return place


def _replicate(load: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """[R, n] items on ``slots`` slots: the item of each slot, which replica of it, and the replicas of each item."""
    rows, items = load.shape
    item = torch.arange(items).repeat(rows, 1)
    count = torch.ones_like(item)
    extra, ranks = [item], [torch.zeros_like(item)]
    for _ in range(slots - items):
        heaviest = (load / count).max(1, keepdim=True).indices
        extra.append(heaviest)
        ranks.append(count.gather(1, heaviest))
        count.scatter_add_(1, heaviest, torch.ones_like(heaviest))
    return torch.cat(extra, 1), torch.cat(ranks, 1), count


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(
        1, permutation, torch.arange(permutation.shape[1]).expand_as(permutation)
    )


def _placement(physical: Tensor, rank: Tensor, count: Tensor) -> Placement:
    layers, experts = count.shape
    width = int(count.max()) if layers else 1
    logical = torch.full((layers, experts * width), -1, dtype=torch.int64)
    logical.scatter_(1, physical * width + rank, torch.arange(physical.shape[1]).expand_as(physical))
    return Placement(physical, logical.view(layers, experts, width), count)


def _from_physical(physical: Tensor, experts: int) -> Placement:
    """A placement whose replicas are numbered in order of slots."""
    layers, replicas = physical.shape
    chosen = torch.nn.functional.one_hot(physical, experts)  # [L, S, E]
    rank = (chosen.cumsum(1) - 1).gather(2, physical[:, :, None]).view(layers, replicas)
    return _placement(physical, rank, chosen.sum(1))


def main() -> None:
    """Print the imbalance of a skewed load before and after, and after the load has drifted."""
    layers, experts, groups, nodes, gpus, redundant = 8, 256, 8, 4, 32, 32  # 3.4.1: prefilling
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, experts + 1) ** 0.7
    load = torch.stack([zipf[torch.randperm(experts, generator=generator)] for _ in range(layers)])
    drifted = load * torch.exp(0.3 * torch.randn(layers, experts, generator=generator))
    plain = _from_physical(torch.arange(experts).repeat(layers, 1), experts)
    args = (groups, nodes, gpus)
    old = rebalance_experts(load, experts + redundant, *args)
    fresh = rebalance_experts(drifted, experts + redundant, *args)
    print(
        f"{layers} layers, {experts} experts + {redundant} replicas, {gpus} GPUs on {nodes} nodes; Zipf(0.7) load"
    )
    print(f"{'':52}{'max / mean load of a GPU':>26}{'moved per layer':>18}")

    def line(name: str, loads: Tensor, placement: Placement, before: Placement | None) -> None:
        worst = imbalance(loads, placement, gpus).mean().item()
        moved = ""
        if before is not None:
            moved = f"{moved_experts(before.physical_to_logical, placement.physical_to_logical, gpus).double().mean():.1f}"
        print(f"{name:52}{worst:26.3f}{moved:>18}")

    line("experts in order, no replicas", load, plain, None)
    line("rebalance_experts", load, old, None)
    line("the load drifts by exp(0.3 N(0, 1))", drifted, old, None)
    line("  rebalance_experts again", drifted, fresh, old)
    for tolerance in (0.0, 0.02, 0.05, 0.1):
        few = rebalance_with_few_moves(drifted, old.physical_to_logical, *args, tolerance=tolerance)
        line(f"  rebalance_with_few_moves, tolerance {tolerance}", drifted, few, old)


if __name__ == "__main__":
    main()
