"""What a pipeline schedule is: the order of every rank's ops, as plain data.

The generators make it, `verify` judges it, `simulate` times it, `chart` draws it and the executor runs it. None of
them knows the others, so a schedule that a user writes by hand is worth as much as one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an op computes for one stage and one micro-batch."""

    F = "F"  # forward
    B = "B"  # backward: gradients of the inputs and of the weights
    BI = "Bi"  # backward for inputs only; the weights' part is owed and paid by W
    W = "W"  # backward for weights


class Op(NamedTuple):
    """One computation. Stages count from the embedding (0) to the loss; micro-batches count within their direction.

    Direction 1 exists in DualPipe alone: its micro-batches enter at the last rank, where its stage 0 lies.
    """

    kind: Kind
    stage: int
    microbatch: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}{chr(39) * self.direction}@{self.stage}"


class Pair(NamedTuple):
    """A forward and a full backward of another micro-batch that run together, each hiding the other's communication."""

    forward: Op
    backward: Op

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Action = Op | Pair


class Message(NamedTuple):
    """What one stage hands to the next (its activation) or to the one before (the gradient of its input).

    `stage` is the stage that receives it.
    """

    tensor: str
    stage: int
    microbatch: int
    direction: int

    def __str__(self) -> str:
        return f"the {self.tensor} of micro-batch {self.microbatch}{chr(39) * self.direction} for stage {self.stage}"


def ops(action: Action) -> tuple[Op, ...]:
    """The one or two ops of an action, forward first."""
    return (action.forward, action.backward) if isinstance(action, Pair) else (action,)


@dataclass(frozen=True)
class Schedule:
    """`orders[rank]` is what the rank does, in order; `placement[direction][stage]` is the rank that holds the stage.

    `microbatches` is the number of a whole step; each direction takes an equal share of it.
    """

    name: str
    stages: int
    microbatches: int
    placement: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.orders)

    @property
    def directions(self) -> int:
        """1, or 2 where micro-batches enter at both ends."""
        return len(self.placement)

    @property
    def microbatches_per_direction(self) -> int:
        """How many micro-batches enter at one end."""
        return self.microbatches // self.directions

    def held(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(direction, stage) of every part of the model that a rank holds."""
        return tuple(
            (direction, stage)
            for direction, ranks in enumerate(self.placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        )

    def chunk(self, op: Op) -> int:
        """Which of its rank's parts an op uses: DualPipe's direction, or the pass through the ranks in V and loops."""
        return op.direction + op.stage // self.ranks

    def received(self, op: Op) -> Message | None:
        """What an op needs from another stage, if anything."""
        if op.kind is Kind.F and op.stage > 0:
            return Message("activation", op.stage, op.microbatch, op.direction)
        if op.kind in (Kind.B, Kind.BI) and op.stage < self.stages - 1:
            return Message("gradient", op.stage, op.microbatch, op.direction)
        return None

    def sent(self, op: Op) -> Message | None:
        """What an op makes for another stage, if anything."""
        if op.kind is Kind.F and op.stage < self.stages - 1:
            return Message("activation", op.stage + 1, op.microbatch, op.direction)
        if op.kind in (Kind.B, Kind.BI) and op.stage > 0:
            return Message("gradient", op.stage - 1, op.microbatch, op.direction)
        return None

    def receiver(self, message: Message) -> int:
        """The rank that a message goes to."""
        return self.placement[message.direction][message.stage]

    def sender(self, message: Message) -> int:
        """The rank that a message comes from."""
        step = -1 if message.tensor == "activation" else 1
        return self.placement[message.direction][message.stage + step]

    def walk(self, rank: int) -> Iterator[tuple[int, Op]]:
        """(position of the action, op) of a rank in order, pairs taken apart."""
        for position, action in enumerate(self.orders[rank]):
            for op in ops(action):
                yield position, op
