"""Rows of a packed stream in shuffled order, window by window, so that a small batch is not one document.

At the report's size a batch holds thousands of documents. With 16 rows of 256 tokens it would hold one scene of one play,
and the gradient would be that scene's. So `window` consecutive rows are read at once and dealt out in a seeded order: every
row once, none repeated, and the state is the loader's own at the window's start plus a count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from examples.data.pack import Batch, PackedLoader
from examples.errors import UserError


class RowShuffle:
    """The same interface as `PackedLoader`: `next_batch`, `state_dict`, `load_state_dict`.

    window: rows that are shuffled among themselves; 1 leaves the order alone. The order depends on `seed` and on the
    number of the window only, so batches of any sizes deal out the same rows in the same order.
    """

    def __init__(self, loader: PackedLoader, window: int, *, seed: int) -> None:
        if window < 1:
            raise UserError(f"data.shuffle_rows: must be at least 1; got {window}")
        self._loader, self._window, self._seed = loader, window, seed
        self._number = 0  # of the window under way
        self._dealt = 0  # rows of it that were given out
        self._start: dict[str, Any] = loader.state_dict()  # of the loader, where the window under way begins
        self._rows: Batch | None = None
        self._order = np.zeros(0, dtype=np.int64)

    @property
    def source_names(self) -> list[str]:
        """Names behind the numbers in `Batch.source`."""
        return self._loader.source_names

    def next_batch(self, batch_size: int) -> Batch:
        """The next rows."""
        parts: list[Batch] = []
        needed = batch_size
        while needed:
            if self._dealt == self._window:
                self._start = self._loader.state_dict()
                self._number, self._dealt, self._rows = self._number + 1, 0, None
            if self._rows is None:
                self._read()
            taken = min(needed, self._window - self._dealt)
            assert self._rows is not None
            parts.append(_select(self._rows, self._order[self._dealt : self._dealt + taken]))
            self._dealt += taken
            needed -= taken
        return _join(parts)

    def _read(self) -> None:
        self._rows = self._loader.next_batch(self._window)
        self._order = np.random.default_rng([self._seed, self._number]).permutation(self._window)

    def state_dict(self) -> dict[str, Any]:
        """JSON; valid for another batch size."""
        return {"window": self._window, "number": self._number, "dealt": self._dealt, "loader": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly; the window must be the one of the state."""
        if state["window"] != self._window:
            raise UserError(
                f"data.shuffle_rows: must be {state['window']} to resume this run; got {self._window}"
            )
        self._number, self._dealt = state["number"], state["dealt"]
        self._start = state["loader"]
        self._loader.load_state_dict(self._start)
        self._read()  # also when all of it was dealt out: the loader then stands where the next one begins


def _select(rows: Batch, index: np.ndarray) -> Batch:
    at = torch.from_numpy(index)
    return Batch(
        tokens=rows.tokens[at],
        positions=rows.positions[at],
        cu_seqlens=torch.zeros(0, dtype=torch.int32),  # `_join` makes it
        source=rows.source[at],
        loss_mask=rows.loss_mask[at],
        document_mask=rows.document_mask,
    )


def _join(parts: list[Batch]) -> Batch:
    positions = torch.cat([part.positions for part in parts])
    # A segment begins wherever positions restart.
    starts = (positions.flatten() == 0).nonzero().flatten()
    end = torch.tensor([positions.numel()])
    return Batch(
        tokens=torch.cat([part.tokens for part in parts]),
        positions=positions,
        cu_seqlens=torch.cat([starts, end]).to(torch.int32),
        source=torch.cat([part.source for part in parts]),
        loss_mask=torch.cat([part.loss_mask for part in parts]),
        document_mask=parts[0].document_mask,
    )
