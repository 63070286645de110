"""Held-out loss and bits per byte of each source, and how evenly the experts are loaded on it (section 4.4.1, 4.5.2).

`held_out_loss` reads packed rows, as training does; `text_score` reads documents one by one, and so has an interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from examples.data.evaluation import EvalBatches
from examples.data.shards import ShardReader
from examples.errors import UserError
from examples.evals.statistics import ratio
from examples.evals.text_model import TextModel, rolling_windows, score_continuations
from examples.model.transformer import Transformer


@dataclass(frozen=True)
class SourceLoss:
    """Of one source: nats per token, of the token after next (MTP, 0 without), bits per byte, and how much was read."""

    loss: float
    mtp_loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out result. loss, bits_per_byte: of the mixture, each source with its weight. load: expert load / mean on that
    mixture, [layers, E], main layers then MTP; max_violation: its largest value - 1, per layer."""

    loss: float
    bits_per_byte: float
    sources: dict[str, SourceLoss]
    load: list[list[float]]
    max_violation: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    readers: Mapping[str, ShardReader],
    seq_len: int,
    *,
    batch_size: int = 16,
    max_tokens: int = 16384,
    mask_documents: bool = False,
    weights: Mapping[str, float] | None = None,
) -> HeldOut:
    """Evaluate at most `max_tokens` tokens of each source; the model's training mode and counts are left alone.

    weights: share of each source in the totals, as in training; None: by the tokens that were read.
    """
    was_training = model.training
    model.eval()
    device = model.embed.weight.device
    sources, counts = {}, {}
    for name, reader in readers.items():
        nats = mtp_nats = 0.0
        tokens = seen_bytes = 0
        for batch, n_bytes in EvalBatches(
            reader, seq_len, batch_size, max_tokens, mask_documents=mask_documents
        ):
            batch = batch.to(device)
            layout = {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions} if mask_documents else {}
            output = model.loss(
                batch.tokens, loss_mask=batch.loss_mask, mtp_weight=1.0, balance_alpha=0.0, **layout
            )
            n = int(batch.loss_mask.sum())
            nats += float(output.main) * n
            mtp_nats += sum(map(float, output.mtp[:1])) * n
            tokens, seen_bytes = tokens + n, seen_bytes + n_bytes
            counts[name] = counts.get(name, 0) + output.counts.double()
        sources[name] = SourceLoss(
            nats / tokens, mtp_nats / tokens, nats / math.log(2) / max(1, seen_bytes), tokens, seen_bytes
        )
    model.train(was_training)
    share = {name: source.tokens if weights is None else weights[name] for name, source in sources.items()}
    nats = sum(share[name] * source.loss for name, source in sources.items())
    text = sum(share[name] * source.bytes / source.tokens for name, source in sources.items())
    # A source counts with its share, whatever number of its tokens was read.
    mixed = sum(counts[name] * (share[name] / sources[name].tokens) for name in sources)
    load = mixed / mixed.mean(-1, keepdim=True)
    return HeldOut(
        loss=nats / sum(share.values()),
        bits_per_byte=nats / math.log(2) / text,
        sources=sources,
        load=load.tolist(),
        max_violation=(load.amax(-1) - 1).tolist(),
    )


def text_score(text: TextModel, documents: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Bits per byte of documents (token ids, by source), each read from its beginning in windows.

    low, high: 95 % interval over documents. chance: what giving every token the same probability gets. sources: of each.
    """
    flat = [ids for group in documents.values() for ids in group]
    if not flat or not all(flat):
        raise UserError("bits per byte: there must be documents, none of them empty")
    bos, limit = text.tokenizer.bos_id, text.limit
    windows = [rolling_windows(ids, bos, limit) for ids in flat]
    scores = iter(score_continuations(text.model, [w for group in windows for w in group], text.batch_size))
    bits = [-sum(next(scores)[0] for _ in group) / math.log(2) for group in windows]
    sizes = [sum(len(text.tokenizer.bytes_of(i)) for i in ids) for ids in flat]
    value, low, high = ratio(bits, sizes)
    chance = math.log2(text.tokenizer.vocab_size) * sum(map(len, flat)) / sum(sizes)
    sources, at = {}, 0
    for name, group in documents.items():
        sources[name] = sum(bits[at : at + len(group)]) / max(1, sum(sizes[at : at + len(group)]))
        at += len(group)
    return {
        "name": "bits per byte",
        "value": value,
        "low": low,
        "high": high,
        "count": len(flat),
        "chance": chance,
        "near_chance": high >= chance,
        "unit": "bits/byte",
        "sources": sources,
    }
