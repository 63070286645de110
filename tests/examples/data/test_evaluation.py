"""Held-out batches: all text once, in order, with the bytes that it stands for."""

from __future__ import annotations

import pytest
import torch

from examples.data.build import build_shards, open_shards
from examples.data.evaluation import EvalBatches
from examples.errors import UserError

from .conftest import SAMPLE

DOCUMENTS = [[d * 100 + k for k in range(n)] for d, n in enumerate([3, 17, 1, 8, 4])]
FLAT = [i for d in DOCUMENTS for i in d]


@pytest.mark.parametrize("seq_len", [1, 4, 5, 8, 32, 40])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mask", [False, True])
def test_every_token_is_predicted_once_in_order(make_reader, seq_len, batch_size, mask):
    batches = EvalBatches(make_reader(DOCUMENTS), seq_len, batch_size, mask_documents=mask)
    for _ in range(2):  # each iteration starts again
        predicted, fed, total = [], [], 0
        shapes = []
        for batch, n_bytes in batches:
            predicted += batch.labels[batch.loss_mask].tolist()
            fed += batch.inputs.reshape(-1).tolist()
            total += n_bytes
            shapes.append(batch.tokens.shape[0])
        expected = [i for i in FLAT[1:] if not (mask and i % 100 == 0)]
        assert predicted == expected
        assert fed[: len(FLAT) - 1] == FLAT[:-1] and not any(fed[len(FLAT) :]), "padding is token 0"
        assert total == sum(i % 7 for i in expected)
        assert len(shapes) == len(batches) and all(s == batch_size for s in shapes[:-1])


def test_max_tokens_caps_whole_rows(make_reader):
    reader = make_reader(DOCUMENTS)
    for limit, rows in ((1, 1), (8, 1), (23, 2), (24, 3), (1000, 4)):
        batches = EvalBatches(reader, 8, 2, limit)
        assert batches.rows == rows == sum(batch.tokens.shape[0] for batch, _ in batches)


def test_bytes_are_those_of_the_text(tokenizer, tmp_path):
    texts = [SAMPLE[0], "held out ä 日本\n", SAMPLE[2]]
    build_shards({"s": texts}, tokenizer, tmp_path, fim_rate=0, held_out_every=0, log=lambda line: None)
    reader = open_shards(tmp_path, "train", tokenizer.fingerprint)["s"]
    total = sum(n for _, n in EvalBatches(reader, 16, 2))
    assert total == sum(len(text.encode()) for text in texts)
    counted = sum(int(batch.loss_mask.sum()) for batch, _ in EvalBatches(reader, 16, 2))
    assert counted == reader.tokens - 1


def test_a_document_of_one_token_and_empty_readers(make_reader):
    ((batch, n_bytes),) = EvalBatches(make_reader([[5]], "one"), 4, 2)
    assert (
        not batch.loss_mask.any() and n_bytes == 0 and torch.equal(batch.inputs, torch.tensor([[5, 0, 0, 0]]))
    )
    with pytest.raises(UserError, match="no held-out document"):
        EvalBatches(make_reader([], "none"), 4, 2)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        EvalBatches(make_reader([[5]], "again"), 4, 0)
