"""Rebalancing one layer by few moves: the search behind `deepseek_ops.parallel.eplb.rebalance_with_few_moves`.

A *move* is an expert whose weights a GPU must receive. Two kinds of change are tried: two slots of different GPUs
exchange their experts, and a slot gives up one of several replicas of an expert for one more replica of another. Each
step takes the change that lowers the excess over the target most per move; when no excess is left, changes that
bring experts home again (negative cost) are taken while the target holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SLACK = 1e-12  # of the target: the order of fp64 sums must not decide whether a bound holds


def moved_on_gpus(before: Ints, after: Ints, num_gpus: int) -> int:
    """Pairs of GPU and expert that are in ``after`` and not in ``before``; both [num_replicas]."""
    old, new = before.reshape(num_gpus, -1), after.reshape(num_gpus, -1)
    return sum(len(set(n.tolist()) - set(o.tolist())) for o, n in zip(old, new, strict=True))


def few_moves(
    load: Floats,
    current: Ints,
    best: Ints,
    *,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    tolerance: float,
) -> Ints:
    """Slots of one layer after rebalancing ``current``; ``best`` is the placement that sets the standard."""
    layer = _Layer(load, current, num_groups, num_nodes, num_gpus)
    now = layer.heaviest(current)
    target = (1 + tolerance) * min(now, layer.heaviest(best)) * (1 + _SLACK)
    whole = layer.groups_are_whole(current)
    if whole and now <= target:
        return current.copy()
    candidates = [layer.bring_home(layer.renamed(best), target)]
    if whole:
        lowered = layer.lower(current.copy(), target)
        if layer.heaviest(lowered) <= target:
            candidates.append(layer.bring_home(lowered, target))
    chosen = min(
        candidates, key=lambda slots: (moved_on_gpus(current, slots, num_gpus), layer.heaviest(slots))
    )
    return _settled(current, chosen, num_gpus)


@dataclass(frozen=True)
class _Change:
    gain: float  # excess over the target that it removes
    cost: int  # moves that it adds; negative where an expert comes home
    peak: float  # heaviest GPU afterwards, only of those it touches
    slots: tuple[int, ...]
    experts: tuple[int, ...]  # their new experts


class _Layer:
    def __init__(self, load: Floats, current: Ints, groups: int, nodes: int, gpus: int) -> None:
        self.load, self.gpus, self.nodes, self.groups = load, gpus, nodes, groups
        slots = len(current)
        self.gpu = np.arange(slots) // (slots // gpus)
        self.node = np.arange(slots) // (slots // nodes)
        self.group = np.arange(len(load)) // (len(load) // groups)
        self.fetch = 1 - self._table(current).astype(
            np.int64
        )  # [gpus, E]: a move, if that expert comes there

    def _table(self, slots: Ints) -> Bools:
        table = np.zeros((self.gpus, len(self.load)), dtype=bool)
        table[self.gpu, slots] = True
        return table

    def count(self, slots: Ints) -> Ints:
        return np.bincount(slots, minlength=len(self.load))

    def loads(self, slots: Ints) -> Floats:
        share = self.load / np.maximum(self.count(slots), 1)
        return np.bincount(self.gpu, weights=share[slots], minlength=self.gpus).astype(np.float64)

    def heaviest(self, slots: Ints) -> float:
        return float(self.loads(slots).max())

    def groups_are_whole(self, slots: Ints) -> bool:
        """Whether every group lies on one node, and as many groups on each."""
        lies = np.zeros((self.groups, self.nodes), dtype=bool)
        lies[self.group[slots], self.node] = True
        return bool((lies.sum(1) == 1).all() and (lies.sum(0) == self.groups // self.nodes).all())

    def renamed(self, slots: Ints) -> Ints:
        """The same placement with nodes, and GPUs within nodes, exchanged so that most experts are where they were."""
        rows = slots.reshape(self.gpus, -1)
        stay = np.array([[len(set(row.tolist())) for row in rows]]).T - np.stack(
            [self.fetch[:, np.unique(row)].sum(1) for row in rows]
        )  # [new GPU, old GPU]: experts in common
        per = self.gpus // self.nodes
        within = {}
        value = np.zeros((self.nodes, self.nodes), dtype=np.int64)
        for new in range(self.nodes):
            for old in range(self.nodes):
                block = stay[new * per : (new + 1) * per, old * per : (old + 1) * per]
                within[new, old] = _match(block)
                value[new, old] = block[np.arange(per), within[new, old]].sum()
        out = np.empty_like(rows)
        for new, old in enumerate(_match(value)):
            out[old * per + within[new, int(old)]] = rows[new * per : (new + 1) * per]
        return out.reshape(-1)

    def lower(self, slots: Ints, target: float) -> Ints:
        """Change slots until no GPU exceeds the target, or nothing helps any more."""
        while (change := self._best_change(slots, target)) is not None:
            slots[list(change.slots)] = change.experts
        return slots

    def bring_home(self, slots: Ints, target: float) -> Ints:
        """Undo moves that the target does not need."""
        while True:
            changes = [c for c in self._changes(slots, target, homewards=True) if c.peak <= target]
            if not changes:
                return slots
            change = min(changes, key=lambda c: (c.cost, c.peak, c.slots, c.experts))
            slots[list(change.slots)] = change.experts

    def _best_change(self, slots: Ints, target: float) -> _Change | None:
        changes = self._changes(slots, target, homewards=False)
        return max(changes, key=lambda c: c.gain / max(c.cost, 0.25), default=None)

    def _changes(self, slots: Ints, target: float, homewards: bool) -> list[_Change]:
        """The best exchange and the best replacement; homewards: all that cost less than nothing and keep the target."""
        return [
            *self._exchanges(slots, target, homewards),
            *self._replacements(slots, target, homewards),
        ]

    def _exchanges(self, slots: Ints, target: float, homewards: bool) -> list[_Change]:
        weight = (self.load / self.count(slots))[slots]
        loads, here = self.loads(slots), self._table(slots)
        one, two = np.triu_indices(len(slots), 1)
        legal = (self.node[one] == self.node[two]) & (self.gpu[one] != self.gpu[two])
        if not homewards:
            over = loads > target
            legal &= over[self.gpu[one]] | over[self.gpu[two]]
        one, two = one[legal], two[legal]
        apart = ~here[self.gpu[two], slots[one]] & ~here[self.gpu[one], slots[two]]
        one, two = one[apart], two[apart]
        a, b, e, f = self.gpu[one], self.gpu[two], slots[one], slots[two]
        cost = self.fetch[b, e] + self.fetch[a, f] - self.fetch[a, e] - self.fetch[b, f]
        after_a, after_b = loads[a] - weight[one] + weight[two], loads[b] + weight[one] - weight[two]
        peak = np.maximum(after_a, after_b)
        gain = _excess(loads[a], target) + _excess(loads[b], target)
        gain = gain - _excess(after_a, target) - _excess(after_b, target)
        return [
            _Change(
                float(gain[i]),
                int(cost[i]),
                float(peak[i]),
                (int(one[i]), int(two[i])),
                (int(f[i]), int(e[i])),
            )
            for i in _promising(gain, cost, peak, target, homewards)
        ]

    def _replacements(self, slots: Ints, target: float, homewards: bool) -> list[_Change]:
        count, loads, here = self.count(slots), self.loads(slots), self._table(slots)
        share = self.load / count
        copies = np.zeros((len(self.load), self.gpus))  # [E, gpus]
        np.add.at(copies, (slots, self.gpu), 1.0)
        home = np.zeros(self.groups, dtype=np.int64)
        home[self.group[slots]] = self.node
        spare = np.flatnonzero(count[slots] >= 2)
        legal = ~here[self.gpu[spare]]
        legal &= home[self.group][None] == self.node[spare][:, None]
        if homewards:
            legal &= (self.fetch[self.gpu[spare]] - self.fetch[self.gpu[spare], slots[spare]][:, None]) < 0
        else:  # it can help to give a hot expert a replica, or to take one from a hot GPU
            over = loads > target
            legal &= here[over].any(axis=0, keepdims=True) | over[self.gpu[spare]][:, None]
        which, new = np.nonzero(legal)
        slot = spare[which]
        old, gpu, at = slots[slot], self.gpu[slot], np.arange(len(slot))
        after = (
            loads + copies[old] * (share[old] / (count[old] - 1))[:, None]
        )  # count * share / (count - 1) - share
        after[at, gpu] -= self.load[old] / (count[old] - 1)
        after -= copies[new] * (share[new] / (count[new] + 1))[:, None]
        after[at, gpu] += self.load[new] / (count[new] + 1)
        cost = self.fetch[gpu, new] - self.fetch[gpu, old]
        gain = _excess(loads, target).sum() - _excess(after, target).sum(1)
        peak = after.max(1, initial=0.0)
        return [
            _Change(float(gain[i]), int(cost[i]), float(peak[i]), (int(slot[i]),), (int(new[i]),))
            for i in _promising(gain, cost, peak, target, homewards)
        ]


def _excess(loads: Floats, target: float) -> Floats:
    return np.maximum(loads - target, 0.0)


def _promising(gain: Floats, cost: Ints, peak: Floats, target: float, homewards: bool) -> list[int]:
    """Indices of the changes worth an object."""
    if homewards:
        return [int(i) for i in np.flatnonzero((cost < 0) & (peak <= target))]
    score = gain / np.maximum(cost, 0.25)
    # A gain that rounding could have made would let the search go round in circles.
    return [int(score.argmax())] if len(score) and gain[score.argmax()] > 1e-9 * target else []


def _match(value: NDArray[np.int64]) -> Ints:
    """An assignment of rows to columns with a large sum: greedy, then pairs exchanged while that helps."""
    n = len(value)
    match = np.full(n, -1)
    free = np.ones((n, n), dtype=bool)
    for _ in range(n):
        row, column = divmod(int(np.where(free, value, -1).argmax()), n)
        match[row] = column
        free[row], free[:, column] = False, False
    improved = True
    while improved:
        improved = False
        for i in range(n):
            for j in range(i + 1, n):
                if value[i, match[j]] + value[j, match[i]] > value[i, match[i]] + value[j, match[j]]:
                    match[[i, j]] = match[[j, i]]
                    improved = True
    return match


def _settled(before: Ints, after: Ints, num_gpus: int) -> Ints:
    """``after`` with the slots of each GPU ordered so that whatever stays on the GPU stays in its slot."""
    out = []
    for old, new in zip(before.reshape(num_gpus, -1), after.reshape(num_gpus, -1), strict=True):
        coming = sorted(new.tolist())
        row = np.full(len(old), -1)
        for slot, expert in enumerate(old.tolist()):
            if expert in coming:
                coming.remove(expert)
                row[slot] = expert
        row[row < 0] = coming
        out.append(row)
    return np.concatenate(out)
