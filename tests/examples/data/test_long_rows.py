"""Rows for a longer context: documents whole wherever they fit, every token in one row, resumable to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.data.long_rows import LongRows
from examples.data.mixture import Mixture
from examples.errors import UserError

LONG, SHORT = [9, 30, 14, 21, 16, 12, 25], [2, 3, 1, 4, 2, 5, 3, 2, 1, 2]


class Lengths:
    """A reader that knows lengths only, for plans."""

    fingerprint = "ab"

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, i):
        return self.lengths[i]


def rows_of(sources, seq_len=15, weights=None, seed=3, **options):
    return LongRows(sources, weights or dict.fromkeys(sources, 1.0), seq_len, seed=seed, **options)


@pytest.fixture
def readers(make_reader):
    """Ids say where a token comes from: source * 10000 + document * 100 + place."""
    return {
        name: make_reader([[s * 10_000 + d * 100 + k for k in range(n)] for d, n in enumerate(lengths)], name)
        for s, (name, lengths) in enumerate({"long": LONG, "short": SHORT}.items())
    }


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.integers(1, 20),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_every_token_of_the_stream_stands_in_one_row(a, b, seq_len, sizes):
    sources = {"a": Lengths(a), "b": Lengths(b)}
    rows = rows_of(sources, seq_len)
    taken = []
    for size in sizes:
        oldest = rows.state_dict()["pool"][:1]
        plan = rows.plan(size)
        assert len(plan) == size and all(sum(p.tokens for p in row) == seq_len + 1 for row in plan)
        taken += [piece for row in plan for piece in row]
        assert not oldest or any(list(p)[:3] == oldest[0][:3] for row in plan for p in row)
    state = rows.state_dict()
    drawn = sum(source["consumed"] for source in state["mixture"]["sources"].values())
    pieces = [*map(tuple, taken), *map(tuple, state["pool"])]
    assert sum(end - start for *_, start, end in pieces) == drawn
    # Documents repeat by epochs; each time over, their pieces are a partition.
    mixture = Mixture({"a": len(a), "b": len(b)}, lambda n, i: sources[n].length(i), {"a": 1.0, "b": 1.0}, 3)
    wanted = []
    while sum(mixture.consumed.values()) < drawn:
        source, document, length = mixture.draw()
        wanted += [(source, document, k) for k in range(length)]
    assert sorted(wanted) == sorted((s, d, k) for s, d, start, end in pieces for k in range(start, end))


def test_a_document_that_fits_is_whole_where_short_ones_fill_the_rows():
    rows = rows_of({"long": Lengths(LONG), "short": Lengths(SHORT)})
    for _ in range(5):
        for piece in (p for row in rows.plan(64) for p in row):
            length = (LONG if piece.source == 0 else SHORT)[piece.document]
            if 5 < length <= 16:
                assert (piece.start, piece.end) == (0, length)


def test_what_fills_a_row_does_not_always_stand_last():
    lengths = [10, 11, 6, 7, 5]
    rows = rows_of({"a": Lengths(lengths)})
    cut = [
        place == len(row) - 1
        for row in (row for _ in range(40) for row in rows.plan(3))
        for place, piece in enumerate(row)
        if piece.end < lengths[piece.document]
    ]
    assert len(cut) > 20 and 0.2 < sum(cut) / len(cut) < 0.8


def test_a_batch_is_its_plan(readers):
    plan = rows_of(readers).plan(3)
    for mask in (False, True):
        batch = rows_of(readers, mask_documents=mask).next_batch(3)
        assert batch.document_mask is mask and batch.inputs.shape == batch.labels.shape == (3, 15)
        starts, at = [], 0
        for number, row in enumerate(plan):
            ids = [p.source * 10_000 + p.document * 100 + k for p in row for k in range(p.start, p.end)]
            assert batch.tokens[number].tolist() == ids
            assert batch.source[number].tolist() == [i // 10_000 for i in ids[1:]]
            places = [sum(p.tokens for p in row[:i]) for i in range(len(row))]
            starts += [at + place for place in (places if mask else [0]) if place < 15]
            expected = [not (mask and k + 1 in places) for k in range(15)]
            assert batch.loss_mask[number].tolist() == expected
            at += 15
        assert batch.cu_seqlens.tolist() == [*starts, 45]
        borders = [*starts, 45]
        positions = [k - max(b for b in borders if b <= k) for k in range(45)]
        assert batch.positions.flatten().tolist() == positions


def test_resume_is_bit_exact(readers):
    whole = rows_of(readers)
    for size in (2, 1, 3):
        whole.next_batch(size)
    other = rows_of(readers)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for size in (1, 4, 2):
        a, b = whole.next_batch(size), other.next_batch(size)
        for name in ("tokens", "positions", "cu_seqlens", "source", "loss_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert whole.state_dict() == other.state_dict()


def test_what_does_not_fit_is_said(readers):
    with pytest.raises(UserError, match="batch_size must be at least 1; got 0"):
        rows_of(readers).next_batch(0)
    with pytest.raises(UserError, match="seq_len must be at least 1; got 0"):
        rows_of(readers, 0)
    state = rows_of(readers).state_dict()
    with pytest.raises(UserError, match="seq_len of the saved position must be 31; got 15"):
        rows_of(readers, 31).load_state_dict(state)
    with pytest.raises(UserError, match="seed 3, this run has 4"):
        rows_of(readers, seed=4).load_state_dict(state)
