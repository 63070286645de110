"""Documents to rows: packing without waste, with or without sight across documents, resumable to the bit.

The report packs documents and, in pre-training, lets a token attend across document borders inside its row
(section 4.1: "document packing method for data integrity ... no cross-sample attention masking"); in
fine-tuning the samples of a row cannot see each other (section 5.1). Here both are one stream of tokens, cut
every `seq_len`: a document that meets the end of a row goes on in the next, no token is lost, repeated or
padded. Row r reads tokens [r*S, r*S + S], one more than it feeds, because the last token of a row is
predicted but fed only by the next row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from examples.data.mixture import Mixture
from examples.data.shards import ShardReader
from examples.errors import UserError

_STATE_VERSION = 1


@dataclass
class Batch:
    """B rows of S tokens to feed, S + 1 to know.

    tokens: int64 [B, S + 1]; feed tokens[:, :-1], predict tokens[:, 1:].
    positions: int64 [B, S]; place of each fed token in its segment.
    cu_seqlens: int32 [n + 1]; borders of the segments over the B * S fed tokens in a row: rows, and with
        `document_mask` also documents. Tokens attend within their segment.
    source: int64 [B, S]; number of the source of the token to be predicted (`PackedLoader.source_names`).
    loss_mask: bool [B, S]; False where the label is no continuation of what is fed: with `document_mask` the
    first
        token of the next document, in an `EvalBatches` also padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    source: torch.Tensor
    loss_mask: torch.Tensor
    document_mask: bool

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [B, S], a view."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [B, S], a view."""
        return self.tokens[:, 1:]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def make_batch(
    tokens: np.ndarray,
    first: np.ndarray,
    source: np.ndarray,
    batch_size: int,
    seq_len: int,
    document_mask: bool,
) -> Batch:
    """Cut a stretch of the stream into rows.

    Args:
        tokens: [B * S + 1] ids; first: [B * S + 1] bool, True on the first token of a document;
        source: [B * S + 1] source number of each token.
    """

    def windows(values: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(values[: batch_size * seq_len + 1], seq_len + 1)[
            ::seq_len
        ]

    return batch_of_rows(windows(tokens), windows(first), windows(source), document_mask)


def batch_of_rows(tokens: np.ndarray, first: np.ndarray, source: np.ndarray, document_mask: bool) -> Batch:
    """Rows that are cut already as a `Batch`; all [B, S + 1]: ids, whether a document begins there, source number."""
    rows, seq_len = tokens.shape[0], tokens.shape[1] - 1
    place = np.arange(rows * seq_len, dtype=np.int64)
    starts = place % seq_len == 0
    loss_mask = np.ones((rows, seq_len), dtype=bool)
    if document_mask:
        starts |= first[:, :-1].reshape(-1)
        loss_mask = ~first[:, 1:]
    segment_start = np.maximum.accumulate(np.where(starts, place, 0))

    def shaped(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).reshape(rows, seq_len))

    return Batch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        positions=shaped(place - segment_start),
        cu_seqlens=torch.from_numpy(np.append(np.flatnonzero(starts), place.size).astype(np.int32)),
        source=shaped(source[:, 1:].astype(np.int64)),
        loss_mask=shaped(loss_mask),
        document_mask=document_mask,
    )


class PackedLoader:
    """An endless stream of packed batches over several sources.

    Every rank holds the same position and walks the same documents; of each global batch of world_size * B
    rows it reads the tokens of its own B rows, and only the lengths of the rest. So the union over ranks, the
    saved state and the order of rows do not depend on the number of ranks, and a run may resume on another
    number. All ranks must ask for the same `batch_size` at each step; it may change from step to step.

    Args:
        readers: the shards of each source; all made with one tokenizer.
        weights: share of tokens per source; None: in proportion to the sources' tokens, so that all finish an
        epoch
            together.
        seq_len: S. mask_documents: see `Batch`.
    """

    def __init__(
        self,
        readers: Mapping[str, ShardReader],
        weights: Mapping[str, float] | None,
        seq_len: int,
        *,
        seed: int,
        mask_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not readers:
            raise UserError("loader: there must be at least one source of token shards")
        if seq_len < 1:
            raise UserError(f"loader: seq_len must be at least 1, got {seq_len}")
        if not 0 <= rank < world_size:
            raise UserError(
                f"loader: rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}"
            )
        fingerprints = {name: reader.fingerprint for name, reader in readers.items()}
        if len(set(fingerprints.values())) > 1:
            raise UserError(f"loader: the sources must share one tokenizer, got {fingerprints}")
        for name, reader in readers.items():
            if not len(reader):
                raise UserError(f"{reader.directory}: source {name} holds no documents; leave it out")
        self._readers = dict(readers)
        self.seq_len, self.mask_documents = seq_len, mask_documents
        self._rank, self._world_size = rank, world_size
        if weights is None:
            weights = {name: float(reader.tokens) for name, reader in readers.items()}
        self._mixture = Mixture(
            {name: len(reader) for name, reader in readers.items()},
            lambda name, document: self._readers[name].length(document),
            weights,
            seed,
        )
        self.source_names: list[str] = self._mixture.names
        self._fingerprint = next(iter(fingerprints.values()))
        self._current = self._mixture.draw()
        self._offset = 0
        self._tokens_seen = 0

    @property
    def tokens_seen(self) -> int:
        """Tokens fed so far, over all ranks: the clock of the report's schedules."""
        return self._tokens_seen

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through."""
        return self._mixture.epochs

    def next_batch(self, batch_size: int) -> Batch:
        """The next `batch_size` rows of this rank."""
        if batch_size < 1:
            raise UserError(f"loader: batch_size must be at least 1, got {batch_size}")
        n = batch_size * self.seq_len
        self._skip(self._rank * n)
        tokens = np.empty(n + 1, dtype=np.uint32)
        first = np.zeros(n + 1, dtype=bool)
        source = np.empty(n + 1, dtype=np.int32)
        at = 0
        while at <= n:
            self._next_if_done()
            taken = min(self._current.length - self._offset, n + 1 - at)
            document = self._readers[self.source_names[self._current.source]].document(self._current.document)
            tokens[at : at + taken] = document[self._offset : self._offset + taken]
            source[at : at + taken] = self._current.source
            first[at] = self._offset == 0
            at += taken
            self._offset += taken
        self._offset -= 1  # the last token was only looked at: the next row feeds it
        self._skip((self._world_size - 1 - self._rank) * n)
        self._next_if_done()  # so that the position reads the same on every rank
        self._tokens_seen += self._world_size * n
        return make_batch(tokens, first, source, batch_size, self.seq_len, self.mask_documents)

    def seek(self, tokens: int) -> None:
        """Go to the position where `tokens` tokens have been fed (over all ranks), from the index alone."""
        if tokens < 0:
            raise UserError(f"loader: tokens to seek to must not be negative, got {tokens}")
        self._current, self._offset = self._mixture.seek(tokens)
        self._tokens_seen = tokens

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as a small JSON value; the same on every rank."""
        return {
            "version": _STATE_VERSION,
            "tokenizer": self._fingerprint,
            "tokens_seen": self._tokens_seen,
            "document": [self._current.source, self._current.document, self._offset],
            "mixture": self._mixture.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the stream of the loader that gave `state`, to the bit. The data, weights and seed must be
        the same; seq_len, masking, batch size and number of ranks may differ."""
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"loader: the saved position has version {state.get('version')}, not {_STATE_VERSION}"
            )
        if state["tokenizer"] != self._fingerprint:
            raise UserError(
                f"loader: the saved position is of shards with tokenizer {state['tokenizer']}, "
                f"these have {self._fingerprint}"
            )
        self._mixture.load_state_dict(state["mixture"])
        source, document, offset = state["document"]
        length = self._readers[self.source_names[source]].length(document)
        self._current = self._current._replace(source=source, document=document, length=length)
        self._offset = offset
        self._tokens_seen = state["tokens_seen"]

    def _next_if_done(self) -> None:
        if self._offset == self._current.length:
            self._current, self._offset = self._mixture.draw(), 0

    def _skip(self, tokens: int) -> None:
        while tokens:
            self._next_if_done()
            taken = min(self._current.length - self._offset, tokens)
            self._offset += taken
            tokens -= taken
