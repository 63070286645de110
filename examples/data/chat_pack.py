"""Whole samples to rows: several in each, mutually invisible, loss on answers only (report section 5.1).

Pre-training cuts a stream wherever a row ends. A sample of fine-tuning stays whole, so rows are filled by size, largest first,
each sample into the fullest row that still has room; what is left of a row is padding, a segment of its own that nothing
learns from. The order of samples and rows is a function of (seed, epoch), so a position is just the number of the step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
import torch

from examples.data.chat import ChatSample
from examples.data.pack import Batch
from examples.errors import UserError


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples, row by row: best fit, longest first (ties in the given order). Every length must fit."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


def pack_rows(samples: Sequence[ChatSample], rows: Sequence[Sequence[int]], seq_len: int, pad: int) -> Batch:
    """The samples of each row side by side, as `Batch`: [B, S + 1] tokens with S = `seq_len`.

    cu_seqlens has a border before each sample and before the padding; loss_mask is True where the label is an answer's token.
    The first token of a sample is never an answer, so no label crosses a border.
    """
    shape = (len(rows), seq_len + 1)
    tokens, answer = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=bool)
    starts = np.zeros(shape, dtype=bool)
    starts[:, 0] = True
    for row, indices in enumerate(rows):
        at = 0
        for index in indices:
            sample = samples[index]
            end = at + len(sample)
            if end > seq_len + 1:
                raise UserError(f"row {row}: samples must fit into {seq_len + 1} tokens; got {end}")
            tokens[row, at:end], answer[row, at:end] = sample.ids, sample.answer
            starts[row, at] = True
            at = end
        starts[row, min(at, seq_len)] |= at <= seq_len  # the padding
    starts = starts[:, :seq_len].reshape(-1)
    place = np.arange(starts.size)
    begin = np.maximum.accumulate(np.where(starts, place, 0))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy((place - begin).reshape(len(rows), seq_len)),
        cu_seqlens=torch.from_numpy(np.append(np.flatnonzero(starts), starts.size).astype(np.int32)),
        source=torch.zeros(len(rows), seq_len, dtype=torch.int64),
        loss_mask=torch.from_numpy(np.ascontiguousarray(answer[:, 1:])),
        document_mask=True,
    )


class ChatRows:
    """Epochs of packed rows over a fixed set of samples; `batches(step)` is a function of its arguments.

    dropped: samples that are longer than a row; they are left out whole, never cut.
    """

    def __init__(
        self, samples: Sequence[ChatSample], seq_len: int, batch_size: int, *, pad: int, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise UserError(f"sft.batch_size: must be at least 1; got {batch_size}")
        self.samples = [sample for sample in samples if len(sample) <= seq_len + 1]
        self.dropped = len(samples) - len(self.samples)
        if not self.samples:
            raise UserError(f"sft: none of {len(samples)} samples fits into a row of {seq_len + 1} tokens")
        self.seq_len, self.batch_size, self.pad, self.seed = seq_len, batch_size, pad, seed
        self._epoch, self._rows = -1, [[0]]
        self.rows_per_epoch = len(self._plan(0))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch; the last may have fewer rows."""
        return math.ceil(self.rows_per_epoch / self.batch_size)

    def batches(self, step: int, micro_batch: int = 0) -> list[Batch]:
        """The rows of step `step`, counted from 0 over all epochs, `micro_batch` at a time (0: all at once)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        rows = self._plan(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        size = micro_batch or len(rows)
        return [
            pack_rows(self.samples, rows[i : i + size], self.seq_len, self.pad)
            for i in range(0, len(rows), size)
        ]

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = rng.permutation(len(self.samples))
            rows = fill_rows([len(self.samples[i]) for i in order], self.seq_len + 1)
            shuffled = rng.permutation(len(rows))
            self._rows = [[int(order[i]) for i in rows[r]] for r in shuffled]
            self._epoch = epoch
        return self._rows
