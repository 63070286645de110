"""Where every row of an expert-parallel layer goes, there and back: decided once, from the choices alone (report 3.2.2).

Two hops, each a `Hop` with slots from prefix sums. A token visits a node once and a rank once, whatever number of its experts
is there; copies for each expert are made where it arrives. With the tokens travel tickets: the rank that a token comes from
and its choices. A ticket counts from 1, so that the zeros of an empty slot say "from nobody, to no expert".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .._checks import check_choice, check_range
from .faults import ParallelError
from .group import Group
from .hops import Hop, add_rows, scatter, take


class Groups(Protocol):
    """The three groups of a `Mesh` that take part."""

    @property
    def ep(self) -> Group:
        """All ranks that share out the experts."""

    @property
    def ep_node(self) -> Group:
        """Those in this rank's node."""

    @property
    def ep_rail(self) -> Group:
        """Those at the same place of their nodes."""


@dataclass(frozen=True)
class Bounded:
    """Buffers of a size that is known before any token is: no host waits for a count, and graphs can be captured.

    max_tokens: most tokens of a rank. max_rows: most (token, expert) rows that a rank computes.
    overflow: "error" raises `CapacityError` on all ranks (which the host waits for); "drop" leaves out the rows past
    `max_rows`, last in the order of source rank, token and slot: they add nothing, forward and backward, and are counted.
    """

    max_tokens: int
    max_rows: int
    overflow: str = "error"

    def __post_init__(self) -> None:
        check_range("max_tokens", self.max_tokens, low=0)
        check_range("max_rows", self.max_rows, low=0)
        check_choice("overflow", self.overflow, ("error", "drop"))


class CapacityError(ParallelError):
    """More rows than `Bounded.max_rows` on some rank (`suspects`); raised on all of them."""


class Plan:
    """Good for any number of dispatches and combines of these choices; made by `ExpertParallel.plan`.

    num_tokens, top_k: of this rank. num_rows: rows that it receives. offsets: int32 [E_local + 1], where the experts' rows lie.
    dropped: int64 scalar on the device, rows left out for want of capacity.
    """

    def __init__(
        self, topk_idx: Tensor, groups: Groups, num_experts: int, capacity: Bounded | None, order: str
    ) -> None:
        self.num_tokens, self.top_k = topk_idx.shape
        self.groups, self.capacity = groups, capacity
        self.experts = num_experts // groups.ep.size  # on each rank
        here = (topk_idx >= 0) & (topk_idx < num_experts)
        owner = torch.where(here, topk_idx // self.experts, groups.ep.size)  # past the last rank: nowhere
        ticket = self._travel(torch.where(here, topk_idx + 1, 0), owner, num_experts)
        self._sort(ticket[:, 0].long() - 1, ticket[:, 1:].long() - 1)
        self._direct: Hop | None = None
        if order == "slots":
            self._plan_way_back(owner)

    # --- what dispatch and combine do ----------------------------------------------------------------------------

    def spread(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Tensors [T, ...] of this rank's tokens -> what arrived here, each token once; `expand` makes rows of them."""
        return self.node.there(*self.rail.there(*tokens))

    def expand(self, arrived: Tensor) -> Tensor:
        """[arrived tokens, ...] -> [R, ...] by expert, source rank, token, slot."""
        return take(arrived, self._row_token)

    def expand_slots(self, arrived: Tensor) -> Tensor:
        """[arrived tokens, top_k] -> [R]: what each row's slot says."""
        return take(arrived.flatten(), self._row_place)

    def collect(self, rows: Tensor) -> Tensor:
        """[R, D] -> [T, D]: each token's rows, added up in FP32; see `ExpertParallel` for the order."""
        if self._direct is not None:
            (back,) = self._direct.back(take(rows, self._leaving))
            return add_rows(back, self._way_back)
        return self.total(add_rows(rows, self._row_of))[0]

    def collect_slots(self, values: Tensor) -> Tensor:
        """[R] -> [arrived tokens, top_k], the inverse of `expand_slots`: zeros where there is no row."""
        return take(values, self._row_of.flatten()).view(-1, self.top_k)

    def total(self, *arrived: Tensor) -> tuple[Tensor, ...]:
        """[arrived tokens, ...] -> [T, ...]: sums over the ranks of a node, then over nodes."""
        return self.rail.total(*self.node.total(*arrived))

    # --- planning ------------------------------------------------------------------------------------------------

    def _travel(self, choice: Tensor, owner: Tensor, num_experts: int) -> Tensor:
        """Plan both hops and send the tickets along; returns those that arrive, int32 [arrived, 1 + top_k]."""
        groups, experts = self.groups, self.experts
        local, nodes = groups.ep_node.size, groups.ep_rail.size
        tag = self.top_k << 32 | num_experts
        slots = None if self.capacity is None else self.capacity.max_tokens
        self.rail = Hop(
            _visits(owner // local, nodes), groups.ep_rail, capacity=slots, tag=tag, phase="dispatch to nodes"
        )
        source = choice.new_full((self.num_tokens, 1), groups.ep.index + 1)
        (ticket,) = self.rail.there(torch.cat([source, choice], dim=1).int())

        slots = None if slots is None else slots * nodes
        choice = ticket[:, 1:].long() - 1
        rank = torch.where(choice < 0, -1, choice // experts) - groups.ep_rail.index * local
        rank = torch.where((rank >= 0) & (choice >= 0), rank, local)  # of this node; another's: past the last
        self.node = Hop(
            _visits(rank, local), groups.ep_node, capacity=slots, tag=tag, phase="dispatch in the node"
        )
        return self.node.there(ticket)[0]

    def _sort(self, source: Tensor, choice: Tensor) -> None:
        """Rows from the tickets. An entry is a slot of an arrived token; entries stand by source rank, token, slot."""
        groups, experts, capacity = self.groups, self.experts, self.capacity
        order = torch.where(source < 0, groups.ep.size, source).argsort(stable=True)
        self._source = source[order].repeat_interleave(self.top_k)
        expert = (choice[order] - groups.ep.index * experts).flatten()
        self._arrives = (expert >= 0) & (expert < experts)
        expert = torch.where(self._arrives, expert, experts)
        self.dropped = expert.new_zeros(())
        if capacity is not None:
            count = self._arrives.cumsum(0)
            over = self._arrives & (count > capacity.max_rows)
            self.dropped = over.sum()
            if capacity.overflow == "error":
                self._refuse_overflow(self._arrives.sum(), capacity.max_rows)
            expert = torch.where(over, experts, expert)
        by_expert, entry = expert.sort(stable=True)
        borders = torch.arange(experts + 1, device=entry.device)
        self.offsets = torch.searchsorted(by_expert, borders, out_int32=True)
        if capacity is None:
            self.num_rows = int(self.offsets[-1])
            entry = entry[: self.num_rows]
        else:
            self.num_rows = min(capacity.max_rows, entry.shape[0])
            entry = entry[: self.num_rows]
            row = torch.arange(self.num_rows, device=entry.device)
            entry = torch.where(row < self.offsets[-1], entry, -1)
        self._entry = entry
        self._row_token = torch.where(entry < 0, -1, take(order, entry // self.top_k))
        self._row_place = torch.where(entry < 0, -1, self._row_token * self.top_k + entry % self.top_k)
        row = torch.arange(self.num_rows, device=entry.device)
        self._row_of = scatter(self._row_place, row, order.shape[0] * self.top_k).view(-1, self.top_k)

    def _plan_way_back(self, owner: Tensor) -> None:
        """For `collect` by slots: a slot of the way back for every row, in the order in which its source lists it."""
        ep = self.groups.ep
        capacity = None if self.capacity is None else self.capacity.max_tokens * self.top_k
        direct = Hop(
            _visits(owner.view(-1, 1), ep.size),
            ep,
            capacity=capacity,
            tag=self.top_k,
            phase="combine by slots",
        )
        self._direct = direct
        self._way_back = direct.slot_of.amax(1).view(self.num_tokens, self.top_k)
        # The n-th entry that arrives from a rank is the n-th that it lists; its slots begin where the ranks' before it end.
        source = self._source.clamp(min=0)
        counts = source.new_zeros(ep.size).index_add_(0, source, self._arrives.long())
        starts = torch.tensor([0, *direct.receive[:-1]], device=source.device).cumsum(0)
        shift = starts - (counts.cumsum(0) - counts)
        place = torch.where(self._arrives, self._arrives.cumsum(0) - 1 + shift[source], -1)
        row = torch.arange(self.num_rows, device=source.device)
        row_of_entry = scatter(self._entry, row, source.shape[0])  # -1: dropped
        self._leaving = scatter(place, row_of_entry, direct.received)

    def _refuse_overflow(self, needed: Tensor, most: int) -> None:
        ep = self.groups.ep
        needs = ep.all_gather(needed.view(1), phase="capacity").tolist()
        over = [(rank, rows) for rank, rows in zip(ep.ranks, needs, strict=True) if rows > most]
        if over:
            told = ", ".join(f"rank {rank} needs {rows}" for rank, rows in over)
            message = f"rank {ep.rank}: capacity: max_rows must hold every row of a rank; {told}; got {most}"
            raise CapacityError(message, ep.rank, "capacity", [rank for rank, _ in over])


def _visits(where: Tensor, peers: int) -> Tensor:
    """where [T, k] in 0 .. peers (peers: nowhere) -> bool [T, peers]: whether a row goes to a peer at all."""
    goes = torch.zeros((where.shape[0], peers + 1), dtype=torch.bool, device=where.device)
    return goes.scatter_(1, where.clamp(max=peers), True)[:, :peers]
