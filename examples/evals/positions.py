"""Loss by position: does a model read far beyond the length it was trained on as well as within it?

Averaging a long text position by position would compare the text's beginning with its end. So every position is asked about the
same tokens: a block of as many tokens as the trained length is predicted with nothing before it, with one block of context, with
two, and so on. What differs between two positions is then only where the block stands and how much of its document
precedes it; a model that can use its context gets better or stays equal, and one that cannot bear the position gets worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from examples.data.shards import ShardReader
from examples.errors import UserError
from examples.model.transformer import Transformer

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Blocks:
    """rows[m]: int64 [R, (m + 1) * length + 1], the same R blocks with m blocks of context. sources: of each of the R."""

    length: int
    rows: list[torch.Tensor]
    sources: list[str]

    @property
    def longest(self) -> int:
        """Positions that are asked about."""
        return self.length * len(self.rows)


def find_blocks(readers: Mapping[str, ShardReader], length: int, multiples: int, count: int) -> Blocks:
    """At most `count` blocks of each source, from documents of more than `multiples` * `length` tokens, one of each document
    as long as there are enough. Sources without such documents are left out; if all are, the documents of each are joined, as
    in a row of pre-training. `UserError` if even then nothing is long enough."""
    if length < 1 or multiples < 1 or count < 1:
        raise UserError(
            f"positions: length, multiples and count must be at least 1; got {length}, {multiples}, {count}"
        )
    whole = length * multiples
    texts: list[np.ndarray] = []
    sources: list[str] = []
    for joined in (False, True):
        for name, reader in readers.items():
            found = _texts(reader, whole, count, joined=joined)
            texts += found
            sources += [name] * len(found)
        if texts:
            break
    else:
        raise UserError(
            f"positions: the held-out text of a source must have more than {whole} tokens to measure up to there; "
            f"got at most {max((reader.tokens for reader in readers.values()), default=0)}"
        )
    tokens = torch.from_numpy(np.stack(texts).astype(np.int64))
    return Blocks(length, [tokens[:, -(m * length + 1) :] for m in range(1, multiples + 1)], sources)


def _texts(reader: ShardReader, whole: int, count: int, *, joined: bool) -> list[np.ndarray]:
    """Stretches of `whole` + 1 tokens: first the beginnings of documents, then what follows in them."""
    if joined:
        parts, held = [], 0
        for i in range(len(reader)):
            if held > count * whole:
                break
            parts.append(reader.document(i))
            held += len(parts[-1])
        documents = [np.concatenate(parts)] if parts else []
        lengths = [held] * len(documents)
    else:
        documents, lengths = [], [reader.length(i) for i in range(len(reader))]
    places = [(at, i) for i, size in enumerate(lengths) for at in range(0, size - whole, whole)]
    chosen = sorted(places)[:count]
    return [(documents[i] if joined else reader.document(i))[at : at + whole + 1] for at, i in chosen]


@torch.no_grad()
def block_losses(model: Transformer, blocks: Blocks) -> torch.Tensor:
    """Nats of every token of every block at every distance: fp64 [R, multiples * length], by position."""
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    parts = []
    for rows in blocks.rows:
        step = max(1, TOKENS_AT_ONCE // rows.shape[1])
        nll = [
            model.loss(group.to(device), mtp_weight=0.0, balance_alpha=0.0, per_token=True).nll[
                :, -blocks.length :
            ]
            for group in rows.split(step)
        ]
        parts.append(torch.cat(nll).double().cpu())
    model.train(was_training)
    return torch.cat(parts, dim=1)


def by_position(losses: torch.Tensor, length: int, sources: Sequence[str], bin_width: int) -> dict[str, Any]:
    """What `block_losses` found, JSON-able.

    curve: mean nats in bins of `bin_width` positions. first, last: mean nats of the blocks without context, and at the greatest
    distance. rise: last - first, with its standard error over the blocks, which are the same in both. by_source: first and last
    of each source.
    """
    if length % bin_width:
        raise UserError(
            f"positions: bin_width must divide the block length {length}, so that no bin mixes two distances; "
            f"got {bin_width}"
        )
    rows = losses.shape[0]
    first, last = losses[:, :length].mean(1), losses[:, -length:].mean(1)
    rise = last - first
    error = float(rise.std()) / math.sqrt(rows) if rows > 1 else None
    chosen = {
        name: [i for i, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)
    }
    return {
        "curve": losses.mean(0).view(-1, bin_width).mean(1).tolist(),
        "first": float(first.mean()),
        "last": float(last.mean()),
        "rise": float(rise.mean()),
        "standard_error": error,
        "by_source": {
            name: {"first": float(first[at].mean()), "last": float(last[at].mean()), "blocks": len(at)}
            for name, at in chosen.items()
        },
    }
