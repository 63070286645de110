"""Documents to long rows for context extension: a document stays whole wherever it fits.

The stream of pre-training (`examples.data.pack`) is cut wherever a row ends, which is right while rows are short and many. What
a longer context has to teach stands far apart in one document, so here rows are filled by size: best fit, each document
into the fullest row that has room, as in the packing without truncation (Ding et al., 2024) that the report cites in section
4.1. Only a document longer than a row is cut into rows, and only the shortest piece at hand is cut to fill what is left of
a row, so that nothing is padded. Every token of the stream stands in one row; documents of a row see each other unless
`mask_documents` says otherwise, as in pre-training.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from examples.data.chat_pack import fill_rows
from examples.data.mixture import Mixture
from examples.data.pack import Batch, batch_of_rows
from examples.data.shards import ShardReader
from examples.errors import UserError

_STATE_VERSION = 1


class Piece(NamedTuple):
    """Tokens [start, end) of a document; the source by its place in the mixture."""

    source: int
    document: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class LongRows:
    """An endless stream of packed rows, resumable to the bit; the interface of `PackedLoader`, for one rank.

    readers: shards of each source, made with one tokenizer. weights: share of tokens per source. seed: of the order.
    A batch is chosen from a pool of pieces with one row more than it needs; the oldest piece always goes out.
    """

    def __init__(
        self,
        readers: Mapping[str, ShardReader],
        weights: Mapping[str, float],
        seq_len: int,
        *,
        seed: int,
        mask_documents: bool = False,
    ) -> None:
        if seq_len < 1:
            raise UserError(f"long rows: seq_len must be at least 1; got {seq_len}")
        self._readers, self._seed = list(readers.values()), seed
        self.seq_len, self.mask_documents, self.source_names = seq_len, mask_documents, list(readers)
        self._fingerprint = self._readers[0].fingerprint
        self._mixture = Mixture(
            {name: len(reader) for name, reader in readers.items()},
            lambda name, document: readers[name].length(document),
            weights,
            seed,
        )
        self._pool: list[Piece] = []  # oldest first
        self._batches = 0

    def next_batch(self, batch_size: int) -> Batch:
        """The next `batch_size` rows of `seq_len` tokens to feed and one more to predict."""
        planned = self.plan(batch_size)
        shape = (batch_size, self.seq_len + 1)
        tokens, source = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int32)
        first = np.zeros(shape, dtype=bool)
        for row, pieces in enumerate(planned):
            at = 0
            for piece in pieces:
                end = at + piece.tokens
                document = self._readers[piece.source].document(piece.document)
                tokens[row, at:end] = document[piece.start : piece.end]
                source[row, at:end], first[row, at] = piece.source, True
                at = end
        return batch_of_rows(tokens, first, source, self.mask_documents)

    def plan(self, rows: int) -> list[list[Piece]]:
        """The pieces of the next `rows` rows of exactly `seq_len` + 1 tokens; they leave the pool."""
        if rows < 1:
            raise UserError(f"long rows: batch_size must be at least 1; got {rows}")
        capacity = self.seq_len + 1
        self._refill((rows + 1) * capacity)
        filled = sorted(
            (sorted(row) for row in fill_rows([piece.tokens for piece in self._pool], capacity)),
            key=lambda r: r[0],
        )
        chosen, left = filled[:rows], sorted(i for row in filled[rows:] for i in row)
        planned = [[self._pool[i] for i in row] for row in chosen]
        rest = _BySize([self._pool[i] for i in left])
        for row in planned:
            room = capacity - sum(piece.tokens for piece in row)
            while room:
                piece = rest.take(room)
                row.append(piece)
                room -= piece.tokens
        self._pool = rest.pieces()
        rng = np.random.Generator(np.random.Philox(key=[self._seed, self._batches]))
        self._batches += 1
        # Without this, late positions would be those of the short pieces that fill rows.
        return [[row[i] for i in rng.permutation(len(row))] for row in planned]

    def _refill(self, tokens: int) -> None:
        """Draw documents until the pool holds so many tokens; none of its pieces is longer than a row."""
        held, capacity = sum(piece.tokens for piece in self._pool), self.seq_len + 1
        while held < tokens:
            source, document, length = self._mixture.draw()
            starts = range(0, length, capacity)
            self._pool += [Piece(source, document, at, min(at + capacity, length)) for at in starts]
            held += length

    def state_dict(self) -> dict[str, Any]:
        """The exact position as JSON."""
        return {
            "version": _STATE_VERSION,
            "tokenizer": self._fingerprint,
            "seq_len": self.seq_len,
            "batches": self._batches,
            "pool": [list(piece) for piece in self._pool],
            "mixture": self._mixture.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the stream that gave `state`, to the bit; data, weights and seed must be the same."""
        for key, here in (
            ("version", _STATE_VERSION),
            ("tokenizer", self._fingerprint),
            ("seq_len", self.seq_len),
        ):
            if state.get(key) != here:
                raise UserError(
                    f"long rows: {key} of the saved position must be {here}; got {state.get(key)}"
                )
        self._mixture.load_state_dict(state["mixture"])
        self._batches = state["batches"]
        self._pool = [Piece(*piece) for piece in state["pool"]]


class _BySize:
    """Pieces that fill what is left of rows."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = dict(enumerate(pieces))  # by age
        self._sizes = sorted((piece.tokens, age) for age, piece in self._pieces.items())

    def take(self, room: int) -> Piece:
        """The longest piece that fits, else the beginning of the shortest one."""
        place = bisect.bisect_left(self._sizes, (room + 1, -1)) - 1
        size, age = self._sizes.pop(max(place, 0))
        piece = self._pieces.pop(age)
        if size <= room:
            return piece
        self._pieces[age] = piece._replace(start=piece.start + room)
        bisect.insort(self._sizes, (size - room, age))
        return piece._replace(end=piece.start + room)

    def pieces(self) -> list[Piece]:
        """What is left, oldest first."""
        return [self._pieces[age] for age in sorted(self._pieces)]
