"""Packing: one stream, every token fed once and predicted once, whatever the batch size, rank or restart."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.data.pack import Batch, PackedLoader, make_batch
from examples.errors import UserError

# Two sources; ids say where they come from: source * 10000 + document * 100 + place.
LENGTHS = {"x": [3, 17, 1, 8, 30, 2], "y": [9, 4, 6]}


@pytest.fixture
def readers(make_reader):
    return {
        name: make_reader(
            [[s * 10_000 + d * 100 + k for k in range(n)] for d, n in enumerate(lengths)], name, 20
        )
        for s, (name, lengths) in enumerate(LENGTHS.items())
    }


def _loader(readers, **options) -> PackedLoader:
    options.setdefault("seed", 5)
    return PackedLoader(readers, options.pop("weights", None), options.pop("seq_len", 8), **options)


def _same(a: Batch, b: Batch) -> bool:
    fields = ("tokens", "positions", "cu_seqlens", "source", "loss_mask")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def _stream(loader: PackedLoader, batches: int, size: int = 1) -> list[int]:
    return [i for _ in range(batches) for i in loader.next_batch(size).inputs.reshape(-1).tolist()]


def test_an_epoch_feeds_and_predicts_every_token_exactly_once(readers):
    # All sources finish an epoch together: 61 + 19 tokens are 10 rows of 8.
    assert sum(map(sum, LENGTHS.values())) == 80
    loader = _loader(readers)
    everything = Counter(s * 10_000 + d * 100 + k for s, ns in enumerate(LENGTHS.values())
                         for d, n in enumerate(ns) for k in range(n))  # fmt: skip
    predicted: list[int] = []
    for epoch in range(3):
        fed: list[int] = []
        for size in (1, 4, 2, 3):
            batch = loader.next_batch(size)
            fed += batch.inputs.reshape(-1).tolist()
            predicted += batch.labels.reshape(-1).tolist()
        assert Counter(fed) == everything
        assert loader.tokens_seen == 80 * (epoch + 1)
    # Labels are the same stream one later: all but the very first token, and the first of the fourth epoch.
    assert Counter(predicted[:-1]) + Counter({_stream(_loader(readers), 1)[0]: 1}) == Counter(
        {token: 3 for token in everything}
    )


def test_documents_stay_whole_and_labels_follow_inputs(readers):
    batch = _loader(readers).next_batch(10)
    stream = batch.inputs.reshape(-1).tolist()
    for a, b in pairwise(stream):
        assert b == a + 1 or b % 100 == 0, "inside a document the next token follows, else a document starts"
    assert torch.equal(batch.labels.reshape(-1)[:-1], batch.inputs.reshape(-1)[1:])
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (10, 9)
    assert torch.equal(batch.source, batch.labels // 10_000)


def test_without_mask_rows_are_the_segments(readers):
    batch = _loader(readers).next_batch(4)
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24, 32] and batch.cu_seqlens.dtype == torch.int32
    assert batch.positions.tolist() == [list(range(8))] * 4
    assert bool(batch.loss_mask.all()) and not batch.document_mask


def test_with_mask_segments_are_documents_cut_at_rows(readers):
    batch = _loader(readers, mask_documents=True).next_batch(10)
    assert batch.document_mask
    inputs, positions = batch.inputs.reshape(-1), batch.positions.reshape(-1)
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0 and borders[-1] == 80 and set(range(0, 81, 8)) <= set(borders)
    for start, end in pairwise(borders):
        assert end > start
        assert len(set((inputs[start:end] // 100).tolist())) == 1, "a segment must hold one document"
        assert positions[start:end].tolist() == list(range(end - start))
        assert start % 8 == 0 or inputs[start] % 100 == 0, "a segment starts with its row or with a document"
    for row in range(10):
        for k in range(8):
            first_of_next = batch.labels[row, k] % 100 == 0
            assert bool(batch.loss_mask[row, k]) != bool(first_of_next)
    assert torch.equal(batch.tokens, _loader(readers).next_batch(10).tokens), "masking must not move tokens"


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seq_len=st.integers(1, 7),
    document_mask=st.booleans(),
)
def test_make_batch_against_a_plain_loop(lengths, seq_len, document_mask):
    first = np.array([k == 0 for n in lengths for k in range(n)])
    rows = (len(first) - 1) // seq_len
    if not rows:
        return
    n = rows * seq_len
    batch = make_batch(np.arange(n + 1), first[: n + 1], np.arange(n + 1), rows, seq_len, document_mask)
    borders, positions, mask = [], [], []
    for t in range(n):
        if t % seq_len == 0 or (document_mask and first[t]):
            borders.append(t)
        positions.append(t - borders[-1])
        mask.append(not (document_mask and first[t + 1]))
    assert batch.cu_seqlens.tolist() == [*borders, n]
    assert batch.positions.reshape(-1).tolist() == positions
    assert batch.loss_mask.reshape(-1).tolist() == mask
    assert batch.tokens.tolist() == [list(range(r * seq_len, r * seq_len + seq_len + 1)) for r in range(rows)]
    assert batch.source.reshape(-1).tolist() == list(range(1, n + 1))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_resume_is_bit_identical_even_with_another_batch_size(readers, mask_documents):
    options = {"mask_documents": mask_documents, "weights": {"x": 1.0, "y": 3.0}}
    for stop in range(12):
        loader = _loader(readers, **options)
        for step in range(stop):
            loader.next_batch(1 + step % 3)
        text = json.dumps(loader.state_dict())
        assert len(text) < 1000
        expected = [loader.next_batch(size) for size in (2, 5, 1, 7)]
        resumed = _loader(readers, **options)
        resumed.next_batch(3)
        resumed.load_state_dict(json.loads(text))
        assert all(_same(resumed.next_batch(size), e) for size, e in zip((2, 5, 1, 7), expected, strict=True))
        assert resumed.state_dict() == loader.state_dict()
        # The stream does not depend on how it is cut into batches.
        recut = _loader(readers, **options)
        recut.load_state_dict(json.loads(text))
        assert torch.equal(recut.next_batch(7).tokens, torch.cat([e.tokens for e in expected])[:7])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch_of_one_process(readers, world_size):
    single = _loader(readers, mask_documents=True)
    ranks = [_loader(readers, mask_documents=True, rank=r, world_size=world_size) for r in range(world_size)]
    for size in (1, 3, 2, 2, 5):
        together = single.next_batch(size * world_size)
        parts = [rank.next_batch(size) for rank in ranks]
        for field in ("tokens", "positions", "source", "loss_mask"):
            assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(together, field))
        assert [rank.state_dict() for rank in ranks] == [single.state_dict()] * world_size
    # A run may go on with another number of ranks.
    alone = _loader(readers, mask_documents=True)
    alone.load_state_dict(ranks[-1].state_dict())
    assert _same(alone.next_batch(4), single.next_batch(4))


def test_seek_is_where_the_stream_would_be(readers):
    loader = _loader(readers)
    for steps in range(1, 30):
        loader.next_batch(1)
        sought = _loader(readers)
        sought.next_batch(2)
        sought.seek(8 * steps)
        assert sought.state_dict() == loader.state_dict()
    expected = loader.next_batch(2)
    assert _same(sought.next_batch(2), expected)


def test_weights_decide_the_shares(readers):
    loader = _loader(readers, weights={"x": 1.0, "y": 3.0})
    source = loader.next_batch(500).source
    assert loader.source_names == ["x", "y"]
    assert abs(float((source == 1).float().mean()) - 0.75) < 0.01
    assert loader.epochs["y"] > 100


def test_the_seed_changes_the_order(readers):
    assert _stream(_loader(readers, seed=1), 10) != _stream(_loader(readers, seed=2), 10)
    assert _stream(_loader(readers, seed=1), 10) == _stream(_loader(readers, seed=1), 10)


def test_batch_moves_as_a_whole(readers):
    batch = _loader(readers).next_batch(2).to("meta")
    assert {t.device.type for t in (batch.tokens, batch.positions, batch.source, batch.loss_mask)} == {"meta"}


def test_what_cannot_work_is_refused(readers, make_reader):
    with pytest.raises(UserError, match=r"at least one source"):
        PackedLoader({}, None, 8, seed=0)
    with pytest.raises(UserError, match=r"seq_len must be at least 1, got 0"):
        _loader(readers, seq_len=0)
    with pytest.raises(UserError, match=r"rank must be between 0 and world_size - 1 = 1, got 2"):
        _loader(readers, rank=2, world_size=2)
    with pytest.raises(UserError, match=r"batch_size must be at least 1, got 0"):
        _loader(readers).next_batch(0)
    with pytest.raises(UserError, match=r"source empty holds no documents"):
        PackedLoader({"empty": make_reader([], "empty")}, None, 8, seed=0)
    other = make_reader([[1]], "other", fingerprint="cd" * 32)
    with pytest.raises(UserError, match=r"the sources must share one tokenizer"):
        _loader({**readers, "other": other})
    with pytest.raises(UserError, match=r"saved position is of shards with tokenizer abab.*these have cdcd"):
        _loader({"other": other}).load_state_dict(_loader(readers).state_dict())
    with pytest.raises(UserError, match=r"version 9, not 1"):
        _loader(readers).load_state_dict({"version": 9})
