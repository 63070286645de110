"""The paged latent cache: 576 values per token and layer at the report's size, whatever the number of heads.

Every sequence owns pages through `block_table`; all layers share the table. The main model and each MTP depth have
lengths of their own, because a draft runs ahead of, or behind, what has been verified: rejecting a draft is `truncate`,
and nothing is moved or cleared.

`LatentCache` gives every sequence its pages at the start. Who hands pages out while sequences come and go
(`examples/rollout/engine.py`) keeps tables of its own over `new_pages` and says with a `Span` what a pass appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepseek_ops._checks import ArgumentError, ceil_div, check_range, check_tensor
from examples.model.config import ModelConfig
from examples.model.layers import activation_dtype

PAGE = 64


def new_pages(
    config: ModelConfig,
    blocks: int,
    depths: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[torch.Tensor]:
    """Zeroed pages [blocks, 64, kv_lora + rope] for each main layer, then for each of `depths` MTP depths."""
    shape = (blocks, PAGE, config.latent_width)
    dtype = dtype or activation_dtype(config.precision)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers + depths)]


@dataclass(frozen=True)
class Span:
    """What a pass appends to one sequence: `tokens` from position `start` on. blocks: the sequence's pages, in order."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The sequence's length after the pass."""
        return self.start + len(self.tokens)


class LatentCache:
    """Room for `batch_size` sequences of up to `max_length` tokens.

    drafts: whether the MTP modules have a part in it, as speculative decoding needs; plain decoding saves it.
    pages: per layer (main layers, then MTP depths) [blocks, 64, kv_lora + rope].
    batch_invariant: steps attend with one product per sequence, whose rounding its neighbours cannot change.
    block_table: int32 [B, blocks per sequence]. lengths[d]: int32 [B]; d = 0 the main model, d >= 1 an MTP depth.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        batch_invariant: bool = False,
        drafts: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_range("batch_size", batch_size, low=0)
        check_range("max_length", max_length, low=1)
        self.config, self.max_length, self.batch_invariant = config, max_length, batch_invariant
        per_row = ceil_div(max_length, PAGE)
        depths = config.mtp_depth if drafts else 0
        self.pages = new_pages(config, batch_size * per_row, depths, dtype=dtype, device=device)
        blocks = torch.arange(batch_size * per_row, dtype=torch.int32, device=device)
        self.block_table = blocks.view(batch_size, per_row)
        # What turns a position into its place in the pages, for each page of a sequence.
        self._page_offset = (self.block_table - torch.arange(per_row, device=device)) * PAGE
        zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.lengths = [zero.clone() for _ in range(1 + depths)]
        # Known on the host, so that an overflow is an error before anything is written, without a device sync.
        self._longest = [0] * (1 + depths)

    @property
    def depths(self) -> int:
        """MTP depths that it has room for."""
        return len(self.lengths) - 1

    @property
    def batch_size(self) -> int:
        """Number of sequences now in the cache."""
        return self.block_table.shape[0]

    def reserve(self, depth: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append `count` tokens to every sequence at a depth; returns (positions, slots, new lengths).

        positions, slots: int64 [B * count]. Raises `ArgumentError` if a sequence could outgrow the cache.
        """
        self.check_room(self._longest[depth] + count)
        lengths = self.lengths[depth]
        positions = lengths[:, None] + torch.arange(count, device=lengths.device)
        self._longest[depth] += count
        self.lengths[depth] = lengths + count
        return positions.flatten(), self.slots(positions).flatten(), self.lengths[depth]

    def fill(self, depth: int, lengths: torch.Tensor, longest: int) -> None:
        """Say that sequences now hold `lengths` int32 [B] tokens at a depth, none more than `longest`."""
        self.check_room(longest)
        self.lengths[depth], self._longest[depth] = lengths.to(torch.int32), longest

    def check_room(self, length: int) -> None:
        """Raise `ArgumentError` unless a sequence of `length` tokens fits."""
        if length > self.max_length:
            raise ArgumentError(f"cache: holds at most {self.max_length} tokens per sequence; got {length}")

    @property
    def empty(self) -> bool:
        """Whether nothing has been written since the start or the last `truncate` to 0."""
        return not any(self._longest)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 [B, n] positions of each sequence -> int64 [B, n] places in the pages."""
        page = positions.div(PAGE, rounding_mode="floor")
        return self._page_offset.gather(1, page).add_(positions)

    def truncate(self, lengths: torch.Tensor, depth: int = 0) -> None:
        """Forget everything past `lengths` int [B] at a depth: rejected drafts. Lengths that are not longer stay."""
        check_tensor("lengths", lengths, shape=(self.batch_size,))
        self.lengths[depth] = torch.minimum(self.lengths[depth], lengths.to(torch.int32))
        if self.batch_size:
            self._longest[depth] = int(self.lengths[depth].max())

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these sequences (int64 indices or bool [B]); pages stay in place. For finished sequences."""
        self.block_table, self._page_offset = self.block_table[rows], self._page_offset[rows]
        self.lengths = [lengths[rows] for lengths in self.lengths]

    def repeat(self, count: int) -> LatentCache:
        """A new cache with each sequence `count` times in a row, on pages of its own: several outputs of one prompt."""
        check_range("count", count, low=1)
        pages = self.block_table.repeat_interleave(count, 0).flatten().long()
        new = LatentCache(
            self.config,
            self.batch_size * count,
            self.max_length,
            batch_invariant=self.batch_invariant,
            drafts=self.depths > 0,
            dtype=self.pages[0].dtype,
            device=self.block_table.device,
        )
        new.pages = [layer[pages] for layer in self.pages]
        new.lengths = [lengths.repeat_interleave(count) for lengths in self.lengths]
        new._longest = list(self._longest)
        return new
