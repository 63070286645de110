"""Packed documents as a few dense batches: how the attention reference avoids a loop over documents.

Documents of similar query and key length form one group and are padded, with zeros, to the longest of it.
A group's lengths differ by less than a factor of 1.25, so padding costs at most 1.56 times the work of the
score matrix and usually nothing: equal documents side by side are a plain view.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from .._checks import require


@dataclass
class Rows:
    """One side (queries or keys) of a group: where its documents stand in the packed tensor."""

    starts: list[int]
    lengths: list[int]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def is_view(self) -> bool:
        """Equal documents that follow one another: the padded batch is a view of the packed tensor."""
        step = self.longest
        return all(n == step for n in self.lengths) and all(
            start == self.starts[0] + i * step for i, start in enumerate(self.starts)
        )

    @cached_property
    def _indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(self.longest, device=self.device)
        starts = torch.tensor(self.starts, device=self.device)[:, None]
        valid = position < torch.tensor(self.lengths, device=self.device)[:, None]
        return (starts + position)[valid], valid.flatten().nonzero().squeeze(1)

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [documents, longest, ...], rows past a document's end zero. May be a view."""
        shape = (len(self.starts), self.longest, *packed.shape[1:])
        if self.is_view:
            return packed[self.starts[0] : self.starts[0] + shape[0] * shape[1]].unflatten(0, shape[:2])
        source, target = self._indices
        padded = packed.new_zeros((shape[0] * shape[1], *shape[2:]))
        return padded.index_copy_(0, target, packed.index_select(0, source)).unflatten(0, shape[:2])

    def scatter_(self, packed: torch.Tensor, padded: torch.Tensor) -> None:
        """The inverse of `gather`: writes the valid rows into `packed`, converting to its dtype."""
        if self.is_view:
            self.gather(packed).copy_(padded)
        else:
            source, target = self._indices
            rows = padded.flatten(0, 1).index_select(0, target)
            packed.index_copy_(0, source, rows.to(packed.dtype))


@dataclass
class Block:
    """Some (document, head) pairs x some query rows x the keys [0, keys) that any of the rows may see."""

    pairs: slice
    rows: slice
    keys: int
    first_visit: bool  # the group's last rows come first, and they see all keys
    first: int  # every row sees the keys before this one
    bias: torch.Tensor | None  # 0 or -inf, [pairs or 1, rows, keys - first]

    def mask_(self, scores: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            scores[..., self.first :].add_(self.bias)
        return scores


@dataclass
class Group:
    """Documents that are computed together."""

    queries: Rows
    keys: Rows
    causal: bool

    @property
    def shifts(self) -> list[int]:
        """Row i of a document sees its keys j <= i + shift (causal, aligned at the bottom right)."""
        return [k - q for q, k in zip(self.queries.lengths, self.keys.lengths, strict=True)]

    def rows_without_keys(self) -> torch.Tensor | None:
        """bool [documents, longest query], or None when every row has a key."""
        if not self.causal or min(self.shifts) >= 0:
            return None
        position = torch.arange(self.queries.longest, device=self.queries.device)
        return position < -torch.tensor(self.shifts, device=self.queries.device)[:, None]

    def blocks(self, heads: int, dtype: torch.dtype, *, rows: int, budget: int) -> Iterator[Block]:
        """Cut the group into blocks of at most `rows` query rows and about `budget` scores.

        A row that has no key is shown key 0, so that nothing becomes NaN; `rows_without_keys` undoes it.
        Padded rows need no care: their queries and gradients are zero.
        """
        device = self.queries.device
        total = len(self.queries.starts) * heads
        low, high = min(self.shifts), max(self.shifts)
        shortest, longest = min(self.keys.lengths), self.keys.longest
        shared = low == high if self.causal else shortest == longest
        for top in reversed(range(0, self.queries.longest, rows)):
            bottom = min(top + rows, self.queries.longest)
            row = torch.arange(top, bottom, device=device)
            end = min(max(bottom + high, 1), longest) if self.causal else longest
            if shared:
                # Key columns past a shorter document's end stand right of its diagonal: already hidden.
                first = max(top + 1 + low, 1) if self.causal else end
                visible = (row + (1 + low)).clamp(min=1)[None]
            else:
                lengths = torch.tensor(self.keys.lengths, device=device).repeat_interleave(heads)[:, None]
                visible = lengths.expand(-1, bottom - top)
                first = shortest
                if self.causal:
                    shift = torch.tensor(self.shifts, device=device).repeat_interleave(heads)[:, None]
                    visible = torch.minimum(visible, row + 1 + shift)
                    first = min(first, top + 1 + low)
                visible, first = visible.clamp(min=1), max(first, 1)
            bias = None
            if first < end:
                hidden = torch.arange(first, end, device=device) >= visible[..., None]
                bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            step = max(budget // ((bottom - top) * end), 1)
            for i in range(0, total, step):
                pairs = slice(i, min(i + step, total))
                part = bias if bias is None or shared else bias[pairs]
                yield Block(pairs, slice(top, bottom), end, bottom == self.queries.longest, first, part)


def _size_class(length: int) -> int:
    """A key that lengths within a factor of 1.25 share: four classes to an octave, exact up to 8."""
    shift = max((length - 1).bit_length() - 3, 0)
    return (shift << 32) | -(-length >> shift)


def groups(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None, rows_q: int, rows_k: int, causal: bool
) -> list[Group]:
    """The groups of documents that have queries and keys; the others have nothing to compute.

    cu_seqlens_k None means that the keys are divided as the queries are.
    """
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for name, bounds, limit in (("cu_seqlens_q", bounds_q, rows_q), ("cu_seqlens_k", bounds_k, rows_k)):
        rises = bounds[0] == 0 and all(a <= b for a, b in itertools.pairwise(bounds))
        require(rises and bounds[-1] <= limit, name, f"must rise from 0 to at most {limit} rows", bounds)
    members: dict[tuple[int, int], list[int]] = {}
    sizes_q = [b - a for a, b in itertools.pairwise(bounds_q)]
    sizes_k = [b - a for a, b in itertools.pairwise(bounds_k)]
    for i, (size_q, size_k) in enumerate(zip(sizes_q, sizes_k, strict=True)):
        if size_q and size_k:
            members.setdefault((_size_class(size_q), _size_class(size_k)), []).append(i)
    device = cu_seqlens_q.device
    return [
        Group(
            Rows([bounds_q[i] for i in ids], [sizes_q[i] for i in ids], device),
            Rows([bounds_k[i] for i in ids], [sizes_k[i] for i in ids], device),
            causal,
        )
        for ids in members.values()
    ]
