"""DualPipe (report 3.2.1, figure 5) and DualPipeV: one rule of eight phases, two ways to lay the model on the ranks.

Fold DualPipe's ranks at the middle, and each rank sees a pipeline of half the length that its micro-batches run down (part 0) and
up again (part 1): what comes up to it is the other end's direction. DualPipeV cuts the model so that this is literally
true: rank r holds stages r and 2P-1-r, a single direction goes down and up, and no parameter is held twice.
The rule therefore knows only `depth`, the ranks between this one and its open end, and `half`, the ranks of a half.
"""

from __future__ import annotations

from collections.abc import Sequence

from .order import Order
from .schedule import Action, Schedule


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """DualPipe over an even number of ranks; half of the (even) micro-batches enter at each end."""
    half = ranks // 2
    orders = []
    for rank in range(ranks):
        down, up = (0, rank), (1, ranks - 1 - rank)
        parts = (down, up) if rank < half else (up, down)
        orders.append(_eight_phases(parts, min(rank, ranks - 1 - rank), half, microbatches // 2))
    forth = tuple(range(ranks))
    return Schedule("dualpipe", ranks, microbatches, (forth, forth[::-1]), tuple(orders))


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """DualPipeV: 2 x ranks stages in the form of a V, every micro-batch enters at rank 0 and leaves there."""
    orders = []
    for rank in range(ranks):
        parts = ((0, rank), (0, 2 * ranks - 1 - rank))
        orders.append(_eight_phases(parts, rank, ranks, microbatches))
    forth = tuple(range(ranks))
    return Schedule("dualpipev", 2 * ranks, microbatches, (forth + forth[::-1],), tuple(orders))


def _eight_phases(
    parts: Sequence[tuple[int, int]], depth: int, half: int, microbatches: int
) -> tuple[Action, ...]:
    """The order of the rank at `depth` 0..half-1; `microbatches` run through each part."""
    order = Order(parts)
    outside = half - 1 - depth  # ranks between this one and the middle, where down turns into up
    at_the_middle = outside == 0

    for _ in range(2 * outside):  # 1: fill, until the first micro-batch can have come up
        order.forward(0)
    for _ in range(depth + 1):  # 2: both ways
        order.forward(0)
        order.forward(1)
    for _ in range(outside):  # 3: weight gradients wait for nobody, so they fill what would be a bubble
        order.backward_input(1)
        order.weight()
        order.forward(1)
    for repeat in range(microbatches - 2 * half + depth + 1):  # 4: the steady state
        if (
            repeat == 0 and at_the_middle
        ):  # apart: F has its input long before B has, and a pair would wait for both
            order.forward(0)
            order.backward(1)
        else:
            order.pair(0, 1)
        order.pair(1, 0)
    for _ in range(outside):  # 5: nothing goes down any more
        order.backward(1)
        order.pair(1, 0)
    for repeat in range(2 * (depth + 1)):  # 6: drain; the later half hurries the input gradients on
        part = 1 - repeat % 2
        if repeat <= depth:
            order.backward(part)
        else:
            order.backward_input(part)
    for _ in range(outside):  # 7: what is owed fills the waits of the drain
        order.weight()
        order.backward_input(0)
    for _ in range(depth + 1):  # 8
        order.weight()
    return tuple(order.actions)
