"""Held-out text as batches, in order and once, with the bytes that it predicts.

Loss per token depends on the tokenizer; bits per byte does not: bits_per_byte = sum of loss in nats / ln 2 /
bytes. So each batch comes with the number of bytes of text that its counted labels stand for. Special tokens
stand for none; their loss is still counted, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from examples.data.pack import Batch, make_batch
from examples.data.shards import ShardReader
from examples.errors import UserError


class EvalBatches:
    """Iterate for `(batch, bytes)`: the first documents of `reader`, packed as in training, at most
    `max_tokens` predicted tokens (rounded down to rows, at least one row). Each iteration starts again from
    the beginning.

    The last row may be padded with token 0, excluded by `loss_mask`; the last batch may have fewer rows.
    """

    def __init__(
        self,
        reader: ShardReader,
        seq_len: int,
        batch_size: int,
        max_tokens: int | None = None,
        *,
        mask_documents: bool = False,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        for argument, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"evaluation: {argument} must be at least 1, got {value}")
        if not len(reader):
            raise UserError(f"{reader.directory}: there is no held-out document to evaluate on")
        self._reader, self._seq_len, self._batch_size = reader, seq_len, batch_size
        self._mask_documents = mask_documents
        self._token_bytes = reader.token_bytes if token_bytes is None else token_bytes
        rows = -(-(reader.tokens - 1) // seq_len)
        if max_tokens is not None:
            rows = min(rows, max(1, max_tokens // seq_len))
        self.rows = max(1, rows)

    def __len__(self) -> int:
        return math.ceil(self.rows / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        reader = self._reader
        document = offset = 0  # of the next token to feed
        for at in range(0, self.rows, self._batch_size):
            rows = min(self._batch_size, self.rows - at)
            n = rows * self._seq_len
            tokens = np.zeros(n + 1, dtype=np.uint32)
            first = np.zeros(n + 1, dtype=bool)
            filled = 0
            while filled <= n:
                if offset == reader.length(document):
                    if document + 1 == len(reader):
                        break  # padding follows
                    document, offset = document + 1, 0
                taken = min(reader.length(document) - offset, n + 1 - filled)
                tokens[filled : filled + taken] = reader.document(document)[offset : offset + taken]
                first[filled] = offset == 0
                filled += taken
                offset += taken
            else:
                offset -= 1  # the last token was only looked at: the next row feeds it
            batch = make_batch(tokens, first, np.zeros(n + 1), rows, self._seq_len, self._mask_documents)
            real = torch.from_numpy((np.arange(1, n + 1) < filled).reshape(rows, self._seq_len))
            batch.loss_mask &= real
            counted = self._token_bytes[tokens[1:]][batch.loss_mask.numpy().reshape(-1)]
            yield batch, int(counted.sum(dtype=np.int64))
