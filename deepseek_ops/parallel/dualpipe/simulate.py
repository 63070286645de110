"""When everything happens: a schedule played under costs, and what it says about time and memory.

A rank does its actions in order; an action starts when the rank is free and what it needs has arrived. A pair starts
when both of its halves can, and both hand on at its end. Nothing is drawn by chance and nothing depends on the
order in which this program looks at the ranks: start times are the longest paths of the graph of dependencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .costs import Costs, Link, StageCosts
from .schedule import Action, Kind, Message, Schedule, ops


@dataclass(frozen=True)
class Span:
    """One action in time. `cause` is the (rank, position) whose end let it start; None at time 0."""

    action: Action
    start: float
    end: float
    cause: tuple[int, int] | None


@dataclass(frozen=True)
class Timeline:
    """A simulated step: `spans[rank]` in order, and what follows from them."""

    schedule: Schedule
    costs: StageCosts
    link: Link
    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def total(self) -> float:
        """Time of the whole step."""
        return max(spans[-1].end for spans in self.spans)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(self.costs.of(action) for action in order) for order in self.schedule.orders)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Time that each rank idles or stands in a blocking send, from the step's start to its end."""
        return tuple(self.total - busy for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """Idle share of all ranks' time."""
        return sum(self.bubble) / (self.total * self.schedule.ranks)

    @property
    def peak_chunks(self) -> tuple[int, ...]:
        """Most activation chunks alive at once on each rank: from the start of F to the end of B, or of W."""
        return tuple(int(peak) for peak in self.peak_memory(1, 1))

    @property
    def peak_deferred(self) -> tuple[int, ...]:
        """Most chunks that wait for their W at once on each rank: from the end of Bi to the end of W."""
        return tuple(int(peak) for peak in self.peak_memory(0, 1))

    def peak_memory(
        self, activation: float | Sequence[float], deferred: float | Sequence[float]
    ) -> tuple[float, ...]:
        """Most bytes (or any unit) alive at once on each rank.

        A micro-batch costs `activation` of its stage from the start of F to the end of B or Bi, and after Bi `deferred`
        until the end of W: inputs of Linears and gradients of their outputs, while the rest has been freed.
        """
        stages = self.schedule.stages
        full = list(activation) if isinstance(activation, Sequence) else [activation] * stages
        kept = list(deferred) if isinstance(deferred, Sequence) else [deferred] * stages
        peaks = []
        for rank in range(self.schedule.ranks):
            now = peak = 0.0
            for _, op in self.schedule.walk(rank):  # a rank's order is its order in time; a pair's F is first
                now += {
                    Kind.F: full[op.stage],
                    Kind.B: -full[op.stage],
                    Kind.BI: kept[op.stage] - full[op.stage],
                    Kind.W: -kept[op.stage],
                }[op.kind]
                peak = max(peak, now)
            peaks.append(peak)
        return tuple(peaks)

    @cached_property
    def critical_path(self) -> tuple[tuple[int, Span], ...]:
        """(rank, span) of actions, each let start by the one before, from time 0 to the end of the step.

        Shortening any of them, or a send between two of them on different ranks, can shorten the step; nothing else can.
        """
        rank = max(range(self.schedule.ranks), key=lambda r: self.spans[r][-1].end)
        at: tuple[int, int] | None = (rank, len(self.spans[rank]) - 1)
        path = []
        while at is not None:
            span = self.spans[at[0]][at[1]]
            path.append((at[0], span))
            at = span.cause
        return tuple(reversed(path))


class Stuck(RuntimeError):
    """The schedule cannot be played to its end; `verify` says why."""


def simulate(schedule: Schedule, costs: Costs | None = None, link: Link | None = None) -> Timeline:
    """Play one step. Raises `Stuck` where ranks wait for each other for ever."""
    link = link or Link()
    stage_costs = (costs or Costs()).by_stage(schedule.stages)
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    free = [0.0] * schedule.ranks  # when a rank can start its next action
    arrivals: dict[Message, tuple[float, tuple[int, int]]] = {}
    waiting: dict[Message, int] = {}
    runnable = list(range(schedule.ranks))
    while runnable:
        rank = runnable.pop()
        while len(spans[rank]) < len(schedule.orders[rank]):
            position = len(spans[rank])
            action = schedule.orders[rank][position]
            needed = [message for op in ops(action) if (message := schedule.received(op))]
            missing = next((message for message in needed if message not in arrivals), None)
            if missing is not None:
                waiting[missing] = rank
                break
            start, cause = free[rank], (rank, position - 1) if position else None
            for message in needed:
                if arrivals[message][0] > start:
                    start, cause = arrivals[message]
            end = start + stage_costs.of(action)
            spans[rank].append(Span(action, start, end, cause))
            free[rank] = end
            for message in (made for op in ops(action) if (made := schedule.sent(op))):
                abroad = schedule.receiver(message) != rank
                if abroad and link.blocking:
                    free[rank] = end + link.latency
                arrivals[message] = (end + link.latency * abroad, (rank, position))
                if message in waiting:
                    runnable.append(waiting.pop(message))
    stuck = [rank for rank in range(schedule.ranks) if len(spans[rank]) < len(schedule.orders[rank])]
    if stuck:
        where = ", ".join(f"rank {r} before {schedule.orders[r][len(spans[r])]}" for r in stuck)
        raise Stuck(f"{schedule.name}: no rank can go on: {where}; verify() names the rule that is broken")
    return Timeline(schedule, stage_costs, link, tuple(map(tuple, spans)))
