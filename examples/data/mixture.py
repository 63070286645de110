"""Which document comes next: a token-weighted mixture without random state.

The report does not publish its mixture; what a run needs is that the shares are exact, that a resumed run
sees the same stream, and that the state is a handful of integers. So nothing is drawn at random. The next
document comes from the source that is furthest behind its share of the tokens so far; within a source, epoch
e visits the documents in the order of a keyed permutation that is computed, not stored (a Feistel network
over document numbers, so memory is constant).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from examples.errors import UserError

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
# Weights become integers of this scale, so that the choice of source is exact at any number of tokens.
_WEIGHT_SCALE = 1 << 32


def _mix(x: int) -> int:
    """A 64-bit finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


class Permutation:
    """A pseudo-random bijection of 0..n-1, decided by `key`: `p[i]` in constant memory and about ten
    microseconds."""

    def __init__(self, n: int, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]
        self._n = n
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half; the square domain is below 4n
        self._mask = (1 << self._bits) - 1

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._n:
            raise IndexError(i)
        while True:  # walk the cycle of the larger domain until it is back in range: still a bijection
            left, right = i >> self._bits, i & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            i = left << self._bits | right
            if i < self._n:
                return i


class Drawn(NamedTuple):
    """One document of the stream: which source (by position in the mixture), which document, how many
    tokens."""

    source: int
    document: int
    length: int


class Mixture:
    """An endless, reproducible stream of documents; every source repeats, each epoch in a new order.

    Args:
        documents: number of documents per source; the order of its keys numbers the sources.
        length: tokens of document i of a source, from an index.
        weights: share of tokens per source; any positive scale.
        seed: decides the order of documents, not of sources.
    """

    def __init__(
        self,
        documents: Mapping[str, int],
        length: Callable[[str, int], int],
        weights: Mapping[str, float],
        seed: int,
    ) -> None:
        if set(weights) != set(documents):
            raise UserError(
                f"mixture: weights must name the sources {sorted(documents)}, got {sorted(weights)}"
            )
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"mixture: the weight of {name} must be positive and finite, got {weight}")
            if documents[name] < 1:
                raise UserError(f"mixture: source {name} holds no documents; leave it out")
        self.names = list(documents)
        self.seed = seed
        self._documents = [documents[name] for name in self.names]
        self._length = length
        total = sum(weights.values())
        self._weights = [max(1, round(weights[name] / total * _WEIGHT_SCALE)) for name in self.names]
        self._weight_sum = sum(self._weights)
        self._drawn = [0] * len(self.names)  # documents taken so far, over all epochs
        self._consumed = [0] * len(self.names)  # their tokens
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def draw(self) -> Drawn:
        """Take the next document."""
        total = sum(self._consumed)
        behind = [
            w * total - c * self._weight_sum for w, c in zip(self._weights, self._consumed, strict=True)
        ]
        # Ties (the very start): the heavier source, then the earlier one.
        source = max(range(len(behind)), key=lambda s: (behind[s], self._weights[s], -s))
        epoch, place = divmod(self._drawn[source], self._documents[source])
        document = self._order(source, epoch)[place]
        length = self._length(self.names[source], document)
        self._drawn[source] += 1
        self._consumed[source] += length
        return Drawn(source, document, length)

    def seek(self, token: int) -> tuple[Drawn, int]:
        """From the beginning, go to the document that holds token number `token` of the stream: (document,
        offset in it). Reads lengths only."""
        self._drawn = [0] * len(self.names)
        self._consumed = [0] * len(self.names)
        while True:
            drawn = self.draw()
            if token < drawn.length:
                return drawn, token
            token -= drawn.length

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through."""
        return {n: d / size for n, d, size in zip(self.names, self._drawn, self._documents, strict=True)}

    @property
    def consumed(self) -> dict[str, int]:
        """Tokens taken from each source, the document under way included whole."""
        return dict(zip(self.names, self._consumed, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Integers and names only: the position, and what it is a position in."""
        sources = {
            name: {"documents": n, "weight": w, "drawn": d, "consumed": c}
            for name, n, w, d, c in zip(
                self.names, self._documents, self._weights, self._drawn, self._consumed, strict=True
            )
        }
        return {"seed": self.seed, "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. The sources, their sizes and weights, and the seed must be the
        same."""
        if state["seed"] != self.seed:
            raise UserError(f"mixture: the saved position has seed {state['seed']}, this run has {self.seed}")
        saved = state["sources"]
        if list(saved) != self.names:
            raise UserError(
                f"mixture: the saved position has sources {list(saved)}, this run has {self.names}"
            )
        for name, n, w in zip(self.names, self._documents, self._weights, strict=True):
            for what, here in (("documents", n), ("weight", w)):
                if saved[name][what] != here:
                    raise UserError(
                        f"mixture: the saved position has {saved[name][what]} as {what} of {name}, "
                        f"this run has {here}"
                    )
        self._drawn = [int(saved[name]["drawn"]) for name in self.names]
        self._consumed = [int(saved[name]["consumed"]) for name in self.names]

    def _order(self, source: int, epoch: int) -> Permutation:
        cached = self._orders.get(source)
        if cached is None or cached[0] != epoch:
            order = Permutation(self._documents[source], f"{self.seed}/{self.names[source]}/{epoch}")
            cached = self._orders[source] = (epoch, order)
        return cached[1]
