"""One exchange of rows between the ranks of a group, in both directions, with slots from prefix sums.

Who sends what is a table `goes` [T, P]: row t goes to the p-th rank. Its slot is the number of rows before it that go there,
so that every order in here follows from the table alone: no atomics, no arrival times. The way back brings one row per slot to
where it came from, and `total` adds a row's slots up in FP32, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .faults import ParallelError
from .group import Group, as_bytes, from_bytes


def slots(goes: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, list[int]]:
    """(row of every slot, -1 where empty; slot of (row, peer) [T, P], -1 where it does not go; slots per peer).

    capacity: slots per peer, at least the rows; None: as many as rows go, which the host then waits to know.
    """
    rows, peers = goes.shape
    before = goes.cumsum(0) - 1
    if capacity is None:
        counts = goes.sum(0)
        sizes = counts.tolist()
        starts = counts.cumsum(0) - counts
    else:
        sizes = [capacity] * peers
        starts = torch.arange(peers, device=goes.device) * capacity
    slot_of = torch.where(goes, before + starts, -1)
    row = torch.arange(rows, device=goes.device)[:, None].expand(rows, peers)
    return scatter(slot_of.flatten(), row.flatten(), sum(sizes)), slot_of, sizes


def scatter(index: Tensor, values: Tensor, size: int) -> Tensor:
    """out [size] with out[index[i]] = values[i], -1 elsewhere; an index of -1 writes nothing. Indices are distinct."""
    out = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    out.scatter_(0, torch.where(index < 0, size, index), values)  # the last place is the bin
    return out[:size]


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zeros for -1."""
    if rows.dtype.itemsize == 1 and rows.dtype != torch.uint8:
        return take(rows.view(torch.uint8), index).view(rows.dtype)  # FP8 has no gather
    if rows.shape[0] == 0:
        return rows.new_zeros((index.shape[0], *rows.shape[1:]))
    taken = rows.index_select(0, index.clamp(min=0))
    empty = (index < 0).view(-1, *[1] * (rows.ndim - 1))
    return taken.masked_fill_(empty, 0)


def add_rows(rows: Tensor, index: Tensor) -> Tensor:
    """sum_j rows[index[t, j]], -1 adding nothing: FP32 (FP64 of FP64) from 0 with j ascending, rounded once to rows' dtype."""
    inner = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = torch.zeros((index.shape[0], *rows.shape[1:]), dtype=inner, device=rows.device)
    for column in index.unbind(1):
        total += take(rows, column)
    return total.to(rows.dtype)


class Hop:
    """The exchange. Every rank of the group makes one at the same time.

    goes: bool [T, P]. tag: a number that must be the same on all ranks (what a row is made of). capacity: see `slots`.
    """

    def __init__(self, goes: Tensor, group: Group, *, capacity: int | None, tag: int, phase: str) -> None:
        self.group, self.phase = group, phase
        self.index, self.slot_of, self.send = slots(goes, capacity)
        self.receive = self.send
        if capacity is None and group.size > 1:
            sizes = torch.tensor([[n, tag] for n in self.send], device=goes.device)
            told = group.all_to_all(sizes, phase=f"{phase}: counts").tolist()
            self.receive = [n for n, _ in told]
            odd = [rank for rank, (_, theirs) in zip(group.ranks, told, strict=True) if theirs != tag]
            if odd:
                rule = f"rank {group.rank}: {phase}: rank {odd[0]} sends rows of another make (top_k or number of experts)"
                raise ParallelError(rule, group.rank, phase, odd)

    @property
    def received(self) -> int:
        """Rows (with empty slots) that `there` gives."""
        return sum(self.receive)

    def there(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Tensors [T, ...] with one row each -> what arrives, peers ascending. One message: a row's tensors travel side by side."""
        return self._exchange([take(r, self.index) for r in rows], self.send, self.receive, self.phase)

    def back(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """One row for each that arrived -> [slots, ...] at the sender."""
        return self._exchange(rows, self.receive, self.send, f"{self.phase}, way back")

    def total(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """`back`, then each of the T rows is the sum over its peers, ascending."""
        return tuple(add_rows(r, self.slot_of) for r in self.back(*rows))

    def _exchange(
        self, rows: Sequence[Tensor], send: list[int], receive: list[int], phase: str
    ) -> tuple[Tensor, ...]:
        if self.group.size == 1:
            return tuple(rows)
        packed = [as_bytes(r) for r in rows]
        got = self.group.all_to_all(torch.cat(packed, dim=1), send, receive, phase=phase)
        parts = got.split([part.shape[1] for part in packed], dim=1)
        return tuple(from_bytes(part, r.dtype, r.shape[1:]) for part, r in zip(parts, rows, strict=True))
