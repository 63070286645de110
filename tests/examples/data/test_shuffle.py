"""Row shuffling: every row once, deterministic, independent of batch sizes, resumable anywhere."""

import numpy as np
import pytest
import torch

from examples.data.pack import PackedLoader
from examples.data.shards import ShardReader, ShardWriter
from examples.data.shuffle import RowShuffle
from examples.errors import UserError

SEQ = 8


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Documents of 1 to 30 tokens whose tokens count up, so that a token names its place in the stream."""
    folder = tmp_path_factory.mktemp("shards") / "source"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "source", "0" * 64, token_bytes=np.ones(5000, dtype=np.int32)) as writer:
        at = 0
        while at < 4000:
            n = int(rng.integers(1, 30))
            writer.add(np.arange(at, at + n, dtype=np.uint32))
            at += n
    return ShardReader(folder)


def make(reader, window, *, mask=False):
    loader = PackedLoader({"source": reader}, None, SEQ, seed=3, mask_documents=mask)
    return RowShuffle(loader, window, seed=5)


def rows_of(source, sizes):
    return torch.cat([source.next_batch(n).tokens for n in sizes])


def test_a_window_is_dealt_out_once_in_another_order(reader):
    plain = PackedLoader({"source": reader}, None, SEQ, seed=3).next_batch(64).tokens
    mixed = rows_of(make(reader, 32), [16] * 4)
    for start in (0, 32):
        a, b = plain[start : start + 32], mixed[start : start + 32]
        assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))
        assert not torch.equal(a, b)
    assert torch.equal(rows_of(make(reader, 1), [7, 57]), plain)


def test_batch_sizes_do_not_matter(reader):
    assert torch.equal(rows_of(make(reader, 10), [3, 9, 20, 1, 7]), rows_of(make(reader, 10), [40]))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("before", [0, 1, 9, 10, 11, 25])
def test_resume_at_any_row(reader, before, mask):
    whole = make(reader, 10, mask=mask)
    if before:
        whole.next_batch(before)
    state = whole.state_dict()
    resumed = make(reader, 10, mask=mask)
    resumed.load_state_dict(state)
    for n in (4, 13):
        a, b = whole.next_batch(n), resumed.next_batch(n)
        for field in ("tokens", "positions", "cu_seqlens", "source", "loss_mask"):
            assert torch.equal(getattr(a, field), getattr(b, field))


def test_segments_follow_their_rows(reader):
    batch = make(reader, 16, mask=True).next_batch(16)
    starts = set(batch.cu_seqlens[:-1].tolist())
    flat = batch.inputs.flatten()
    for i in range(1, flat.numel()):
        continues = (
            i % SEQ != 0 and int(batch.positions.flatten()[i]) == int(batch.positions.flatten()[i - 1]) + 1
        )
        assert (i not in starts) == continues
        if continues:  # tokens of one document count up
            assert int(flat[i]) == int(flat[i - 1]) + 1
    assert batch.cu_seqlens[-1] == 16 * SEQ


def test_errors(reader):
    with pytest.raises(UserError, match="shuffle_rows: must be at least 1; got 0"):
        make(reader, 0)
    with pytest.raises(UserError, match="must be 10 to resume this run; got 20"):
        make(reader, 20).load_state_dict(make(reader, 10).state_dict())
