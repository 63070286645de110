"""Loss by position: the same tokens at every distance, and means that a hand can check."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from examples.errors import UserError
from examples.evals.positions import Blocks, block_losses, by_position, find_blocks


class Reader:
    """Documents from lists."""

    def __init__(self, *documents):
        self.documents = [np.array(d, dtype=np.uint32) for d in documents]
        self.tokens = sum(map(len, documents))

    def __len__(self):
        return len(self.documents)

    def length(self, i):
        return len(self.documents[i])

    def document(self, i):
        return self.documents[i]


def test_the_same_block_ends_every_row():
    reader = Reader(range(100, 112), range(200, 225), range(300, 313))
    blocks = find_blocks({"a": reader, "none": Reader([1, 2])}, 4, 3, 5)
    assert blocks.sources == ["a"] * 3 and blocks.longest == 12  # 12 tokens are one too few
    assert blocks.rows[2][:, 0].tolist() == [200, 300, 212]  # one of each document first
    for m, rows in enumerate(blocks.rows, 1):
        assert rows.shape == (3, 4 * m + 1)
        assert torch.equal(rows[:, -5:], blocks.rows[0])
        assert rows[0].tolist() == list(range(212 - 4 * m, 213))
    assert find_blocks({"a": reader}, 4, 3, 2).sources == ["a"] * 2


def test_short_documents_are_joined_if_there_are_no_others():
    short = [list(range(10 * d, 10 * d + 5)) for d in range(6)]
    blocks = find_blocks({"a": Reader(*short), "b": Reader([1, 2])}, 4, 3, 2)
    joined = [token for document in short for token in document]
    assert blocks.sources == ["a", "a"]
    assert blocks.rows[2].tolist() == [joined[:13], joined[12:25]]
    assert find_blocks({"a": Reader(*short), "b": Reader(range(13))}, 4, 3, 2).sources == ["b"]


def test_too_short_texts_are_said():
    with pytest.raises(
        UserError, match="must have more than 40 tokens to measure up to there; got at most 30"
    ):
        find_blocks({"a": Reader(range(25), range(5))}, 10, 4, 1)
    with pytest.raises(UserError, match="must be at least 1; got 4, 3, 0"):
        find_blocks({"a": Reader(range(25))}, 4, 3, 0)


def test_losses_are_those_of_the_whole_distribution(text_model, monkeypatch):
    model = text_model.model.train()
    text = torch.randint(0, model.config.vocab_size, (3, 25), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(8, [text[:, -9:], text[:, -17:], text], ["x"] * 3)
    found = block_losses(model, blocks)
    assert model.training and found.shape == (3, 24) and found.dtype == torch.float64
    model.eval()
    for m in range(3):
        row = text[:, 25 - 8 * (m + 1) - 1 :]
        log_p = torch.log_softmax(model.logits(row[:, :-1]).double(), -1)
        nll = -log_p.gather(-1, row[:, 1:, None]).squeeze(-1)[:, -8:]
        assert torch.allclose(found[:, 8 * m : 8 * m + 8], nll, atol=1e-5)
    monkeypatch.setattr("examples.evals.positions.TOKENS_AT_ONCE", 1)  # row by row
    assert torch.allclose(block_losses(model, blocks), found, atol=1e-5)


def test_means_by_hand():
    # Two blocks of two tokens at two distances.
    losses = torch.tensor([[1.0, 3.0, 2.0, 4.0], [5.0, 7.0, 4.0, 4.0]], dtype=torch.float64)
    found = by_position(losses, 2, ["a", "b"], 1)
    assert found["curve"] == [3.0, 5.0, 3.0, 4.0]
    assert (found["first"], found["last"], found["rise"]) == (4.0, 3.5, -0.5)
    # rises 1 and -2: standard deviation 3 / sqrt 2, over sqrt 2 of them
    assert found["standard_error"] == pytest.approx(3 / math.sqrt(2) / math.sqrt(2))
    assert found["by_source"] == {
        "a": {"first": 2.0, "last": 3.0, "blocks": 1},
        "b": {"first": 6.0, "last": 4.0, "blocks": 1},
    }
    assert by_position(losses, 2, ["a", "a"], 2)["curve"] == [4.0, 3.5]
    assert by_position(losses[:1], 2, ["a"], 2)["standard_error"] is None
    with pytest.raises(UserError, match=r"must divide the block length 2, .*; got 3"):
        by_position(losses, 2, ["a", "b"], 3)
