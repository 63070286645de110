"""Writing down one rank's order: who is next is counted here, so that a generator says only which kind follows which."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from .schedule import Action, Kind, Op, Pair


class Order:
    """The growing order of a rank that holds `parts`, a list of (direction, stage); methods name a part by its index.

    Each part takes its micro-batches in order. Weight gradients that `backward_input` leaves owing are paid by `weight`
    in the order in which they came to be owed, whichever part they belong to: a FIFO of deferred work.
    """

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        self.actions: list[Action] = []
        self.owed: deque[Op] = deque()
        self._parts = parts
        self._next: Counter[tuple[bool, int]] = Counter()

    def forward(self, part: int = 0) -> None:
        """F of the part's next micro-batch."""
        self.actions.append(self._op(Kind.F, part))

    def backward(self, part: int = 0) -> None:
        """B of the part's next micro-batch, weights included."""
        self.actions.append(self._op(Kind.B, part))

    def backward_input(self, part: int = 0) -> None:
        """Bi of the part's next micro-batch; a `weight` is owed from here on."""
        op = self._op(Kind.BI, part)
        self.actions.append(op)
        self.owed.append(op._replace(kind=Kind.W))

    def weight(self) -> None:
        """W that has been owed longest."""
        self.actions.append(self.owed.popleft())

    def pair(self, forward: int, backward: int) -> None:
        """F of one part with B of another, overlapped."""
        self.actions.append(Pair(self._op(Kind.F, forward), self._op(Kind.B, backward)))

    def _op(self, kind: Kind, part: int) -> Op:
        direction, stage = self._parts[part]
        count = (kind is Kind.F, part)
        self._next[count] += 1
        return Op(kind, stage, self._next[count] - 1, direction)
