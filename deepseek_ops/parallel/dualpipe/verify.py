"""Judging a schedule that may come from anywhere: it reads nothing but the lists, and refuses with rank, op and rule.

Five rules, in this order, so that the first one broken is the one to mend:
  once      every (direction, stage, micro-batch) has one F and one B, or one F, one Bi and one W, on the rank that holds it
  local     on its rank F comes before B or Bi, and Bi before W; a pair is an F and a B of two micro-batches or stages
  fifo      on every channel messages are taken in the order in which they are sent
  deadlock  with `buffers` messages in flight per channel at most, every rank comes to its end
  memory    no rank keeps more activation chunks alive than it may
A channel is what flows from one rank to another for one tensor (activation or gradient), direction and stage. Ops that
send into a full channel hold their rank until the receiver has started an op that takes a message out.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import NoReturn

from ..._checks import require
from .schedule import Kind, Message, Op, Pair, Schedule, ops

STEP = {Kind.F: 0, Kind.B: 1, Kind.BI: 1, Kind.W: 2}


class ScheduleError(ValueError):
    """A schedule breaks a rule; `rank`, `position` (of the action in the rank's order) and `rule` say where and which."""

    def __init__(self, rule: str, rank: int, position: int | None, problem: str) -> None:
        self.rule, self.rank, self.position = rule, rank, position
        where = f"rank {rank}" if position is None else f"rank {rank}, op {position}"
        super().__init__(f"{where}: {problem} (rule: {rule})")


def verify(schedule: Schedule, *, buffers: int = 1, peak_chunks: int | Sequence[int] | None = None) -> None:
    """Raise `ScheduleError` unless the schedule keeps every rule; `peak_chunks` bounds all ranks, or one each."""
    require(buffers >= 1, "buffers", "must be at least 1", buffers)
    _once(schedule)
    _local(schedule)
    _fifo(schedule)
    _deadlock(schedule, buffers)
    if peak_chunks is not None:
        bounds = [peak_chunks] * schedule.ranks if isinstance(peak_chunks, int) else list(peak_chunks)
        rule = f"must be one number or {schedule.ranks}, one per rank"
        require(len(bounds) == schedule.ranks, "peak_chunks", rule, f"{len(bounds)} numbers")
        _memory(schedule, bounds)


def _once(schedule: Schedule) -> None:
    seen: dict[Op, tuple[int, int]] = {}
    for rank in range(schedule.ranks):
        for position, op in schedule.walk(rank):
            inside = (
                0 <= op.direction < schedule.directions
                and 0 <= op.stage < schedule.stages
                and 0 <= op.microbatch < schedule.microbatches_per_direction
            )
            if not inside:
                raise ScheduleError(
                    "once", rank, position, f"{op} is no stage and micro-batch of this schedule"
                )
            holder = schedule.placement[op.direction][op.stage]
            if holder != rank:
                raise ScheduleError(
                    "once", rank, position, f"{op} belongs to rank {holder}, which holds its stage"
                )
            if op in seen:
                raise ScheduleError("once", rank, position, f"{op} was op {seen[op][1]} already")
            seen[op] = (rank, position)
    for direction, holders in enumerate(schedule.placement):
        for stage, rank in enumerate(holders):
            for microbatch in range(schedule.microbatches_per_direction):
                _complete(seen, rank, Op(Kind.F, stage, microbatch, direction))


def _complete(seen: dict[Op, tuple[int, int]], rank: int, forward: Op) -> None:
    """One stage and micro-batch has exactly F and B, or F, Bi and W."""
    full, split, weight = (forward._replace(kind=kind) for kind in (Kind.B, Kind.BI, Kind.W))
    if forward not in seen:
        raise ScheduleError("once", rank, None, f"{forward} is missing")
    if full in seen:
        for extra in (split, weight):
            if extra in seen:
                raise ScheduleError("once", *seen[extra], f"{extra} does again what {full} does")
    elif split not in seen:
        if weight in seen:
            raise ScheduleError("once", *seen[weight], f"{weight} has no {split}")
        raise ScheduleError("once", rank, None, f"{full} is missing, and so is {split}")
    elif weight not in seen:
        raise ScheduleError("once", *seen[split], f"{weight} is missing, which {split} leaves owing")


def _local(schedule: Schedule) -> None:
    for rank in range(schedule.ranks):
        reached: Counter[tuple[int, int, int]] = Counter()
        for position, op in schedule.walk(rank):
            key = (op.direction, op.stage, op.microbatch)
            if reached[key] != STEP[op.kind]:
                before = {Kind.F: Kind.F, Kind.B: Kind.F, Kind.BI: Kind.F, Kind.W: Kind.BI}[op.kind]
                raise ScheduleError("local", rank, position, f"{op} comes before {op._replace(kind=before)}")
            reached[key] += 1
        for position, action in enumerate(schedule.orders[rank]):
            if isinstance(action, Pair):
                forward, backward = action
                if forward.kind is not Kind.F or backward.kind is not Kind.B or forward[1:] == backward[1:]:
                    problem = f"{action} is no F with a B that can run beside it"
                    raise ScheduleError("local", rank, position, problem)


Channel = tuple[int, int, str, int, int]  # sender, receiver, tensor, direction, receiving stage


def _channel(schedule: Schedule, message: Message) -> Channel | None:
    """The channel of a message; None where it stays on its rank."""
    ends = schedule.sender(message), schedule.receiver(message)
    return None if ends[0] == ends[1] else (*ends, message.tensor, message.direction, message.stage)


def _fifo(schedule: Schedule) -> None:
    sent: defaultdict[Channel, list[Message]] = defaultdict(list)
    for rank in range(schedule.ranks):
        for _, op in schedule.walk(rank):
            message = schedule.sent(op)
            if message and (channel := _channel(schedule, message)):
                sent[channel].append(message)
    taken: Counter[Channel] = Counter()
    for rank in range(schedule.ranks):
        for position, op in schedule.walk(rank):
            message = schedule.received(op)
            if message and (channel := _channel(schedule, message)):
                head = sent[channel][taken[channel]]
                if head != message:
                    problem = f"{op} takes {message}, but rank {channel[0]} sends {head} before"
                    raise ScheduleError("fifo", rank, position, problem)
                taken[channel] += 1


class _Replay:
    """The lists played without time: whatever can move moves, until all is done or nothing can."""

    def __init__(self, schedule: Schedule, buffers: int) -> None:
        self.schedule, self.buffers = schedule, buffers
        self.done = [0] * schedule.ranks
        self.unsent: list[deque[Message]] = [deque() for _ in range(schedule.ranks)]  # of the op before
        self.there: set[Message] = set()
        self.flying: Counter[Channel] = Counter()

    def finished(self, rank: int) -> bool:
        return not self.unsent[rank] and self.done[rank] == len(self.schedule.orders[rank])

    def obstacle(self, rank: int) -> tuple[int, str] | None:
        """(rank waited for, reason) where this rank cannot move."""
        if self.unsent[rank]:
            message = self.unsent[rank][0]
            channel = _channel(self.schedule, message)
            if channel and self.flying[channel] >= self.buffers:
                return channel[1], f"to send {message}, whose channel is full ({self.buffers})"
            return None
        for op in ops(self.schedule.orders[rank][self.done[rank]]):
            needed = self.schedule.received(op)
            if needed and needed not in self.there:
                return self.schedule.sender(needed), f"for {needed}"
        return None

    def move(self, rank: int) -> None:
        """Send one message of the op before, or do the next action."""
        if self.unsent[rank]:
            message = self.unsent[rank].popleft()
            self.there.add(message)
            if channel := _channel(self.schedule, message):
                self.flying[channel] += 1
            return
        for op in ops(self.schedule.orders[rank][self.done[rank]]):
            taken, made = self.schedule.received(op), self.schedule.sent(op)
            if taken and (channel := _channel(self.schedule, taken)):
                self.flying[channel] -= 1
            if made:
                self.unsent[rank].append(made)
        self.done[rank] += 1

    def at(self, rank: int) -> int:
        """Position of the action that a rank stands at."""
        return self.done[rank] - bool(self.unsent[rank])


def _deadlock(schedule: Schedule, buffers: int) -> None:
    replay = _Replay(schedule, buffers)
    moved = True
    while moved:
        moved = False
        for rank in range(schedule.ranks):
            while not replay.finished(rank) and not replay.obstacle(rank):
                replay.move(rank)
                moved = True
    stuck = [rank for rank in range(schedule.ranks) if not replay.finished(rank)]
    if stuck:
        _explain(replay, stuck[0])


def _explain(replay: _Replay, rank: int) -> NoReturn:
    """Follow who waits for whom from a stuck rank until it closes: that circle is the deadlock."""
    path: list[int] = []
    reasons: dict[int, str] = {}
    while rank not in path:
        path.append(rank)
        obstacle = replay.obstacle(rank)
        assert obstacle, "a stuck rank has an obstacle"
        rank, reasons[path[-1]] = obstacle
    circle = path[path.index(rank) :]
    story = "; ".join(
        f"rank {stuck} at op {replay.at(stuck)} ({replay.schedule.orders[stuck][replay.at(stuck)]}) "
        f"waits {reasons[stuck]}"
        for stuck in circle
    )
    raise ScheduleError("deadlock", circle[0], replay.at(circle[0]), f"waits in a circle: {story}")


def _memory(schedule: Schedule, bounds: Sequence[int]) -> None:
    for rank in range(schedule.ranks):
        alive = 0
        for position, op in schedule.walk(rank):
            alive += {Kind.F: 1, Kind.B: -1, Kind.BI: 0, Kind.W: -1}[op.kind]
            if alive > bounds[rank]:
                problem = f"{op} makes {alive} activation chunks alive; the bound is {bounds[rank]}"
                raise ScheduleError("memory", rank, position, problem)
