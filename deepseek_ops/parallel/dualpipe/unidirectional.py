"""The schedules that DualPipe is compared with (report table 2): 1F1B, interleaved 1F1B, and ZB1P."""

from __future__ import annotations

from .order import Order
from .schedule import Action, Kind, Op, Schedule


def one_forward_one_backward(ranks: int, microbatches: int) -> Schedule:
    """1F1B: a rank starts as many micro-batches as there are ranks from it to the end, then alternates."""
    orders = []
    for rank in range(ranks):
        order = Order([(0, rank)])
        ahead = min(ranks - 1 - rank, microbatches)
        for _ in range(ahead):
            order.forward()
        for _ in range(microbatches - ahead):
            order.forward()
            order.backward()
        for _ in range(ahead):
            order.backward()
        orders.append(tuple(order.actions))
    return Schedule("1f1b", ranks, microbatches, (tuple(range(ranks)),), tuple(orders))


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """ZB1P: 1F1B with split backward; rank r owes the weight gradients of r micro-batches until the drain.

    So every rank keeps `ranks` micro-batches alive, and what the last ranks owe fills the tail of the step.
    """
    orders = []
    for rank in range(ranks):
        order = Order([(0, rank)])
        ahead = min(ranks - 1 - rank, microbatches)
        for _ in range(ahead):
            order.forward()
        for done in range(microbatches):
            if done < microbatches - ahead:
                order.forward()
            order.backward_input()
            if len(order.owed) > rank:
                order.weight()
        while order.owed:
            order.weight()
        orders.append(tuple(order.actions))
    return Schedule("zb1p", ranks, microbatches, (tuple(range(ranks)),), tuple(orders))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: the model goes round the ranks `chunks` times, in groups of `ranks` micro-batches."""
    total = microbatches * chunks
    orders = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)

        def nth(kind: Kind, count: int, rank: int = rank) -> Op:
            group, inside = divmod(count, ranks * chunks)
            chunk, microbatch = divmod(inside, ranks)
            if kind is Kind.B:
                chunk = chunks - 1 - chunk
            return Op(kind, chunk * ranks + rank, group * ranks + microbatch)

        order: list[Action] = [nth(Kind.F, count) for count in range(ahead)]
        for count in range(total - ahead):
            order += [nth(Kind.F, ahead + count), nth(Kind.B, count)]
        order += [nth(Kind.B, count) for count in range(total - ahead, total)]
        orders.append(tuple(order))
    placement = tuple(range(ranks)) * chunks
    return Schedule("interleaved", ranks * chunks, microbatches, (placement,), tuple(orders))
