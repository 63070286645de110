"""Corpus to shards: what is in them is the text, transformed as the report says and nowhere else."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from examples.data import build, shards
from examples.data.build import HeldOut, build_shards, format_table, open_shards
from examples.data.corpus import Documents, Source
from examples.errors import UserError

from .conftest import SAMPLE
from .test_shards import _FullDisk

TEXTS = [f"{SAMPLE[i % 4]}Document number {i};\n\nend.\n" for i in range(300)]


def _build(tokenizer, out, corpus=None, **options):
    options.setdefault("log", lambda line: None)
    return build_shards(corpus or {"s": TEXTS}, tokenizer, out, **options)


def _undo_fim(tokenizer, ids: list[int]) -> str:
    """Text of one stored document, by reading the special tokens."""
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    body = ids[1:-1]
    if body and body[0] == tokenizer.fim_begin_id:
        hole, end = body.index(tokenizer.fim_hole_id), body.index(tokenizer.fim_end_id)
        assert 0 < hole < end
        prefix, suffix, middle = body[1:hole], body[hole + 1 : end], body[end + 1 :]
        return tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix)
    assert not set(body) & set(tokenizer.special_ids.values())
    return tokenizer.decode(body)


def test_stored_documents_are_the_corpus(tokenizer, tmp_path):
    (row,) = _build(tokenizer, tmp_path, fim_rate=0.5, split_share=0.5, held_out_every=10)
    train = open_shards(tmp_path, "train", tokenizer.fingerprint)["s"]
    val = open_shards(tmp_path, "val", tokenizer.fingerprint)["s"]
    stored = [[_undo_fim(tokenizer, r.document(i).tolist()) for i in range(len(r))] for r in (train, val)]
    rule = HeldOut(10)
    held = [t for t in TEXTS if rule(t)]
    assert stored[1] == held and 10 < len(held) < 60
    assert stored[0] == [t for t in TEXTS if t not in set(held)]
    assert row.documents == 300 and row.bytes == sum(len(t.encode()) for t in TEXTS)
    assert row.tokens == train.tokens + val.tokens and row.val_tokens == val.tokens
    assert row.bytes_per_token == pytest.approx(row.bytes / row.tokens, abs=1e-3)
    train.verify(), val.verify()


def test_only_training_documents_are_transformed(tokenizer, tmp_path):
    _build(tokenizer, tmp_path, fim_rate=1.0, split_share=1.0, held_out_every=5)
    train, val = (open_shards(tmp_path, part)["s"] for part in ("train", "val"))
    for i in range(len(train)):
        assert train.document(i)[1] == tokenizer.fim_begin_id
    for i in range(len(val)):
        ids = val.document(i)[1:-1].tolist()
        assert ids == tokenizer.encode(tokenizer.decode(ids)), "held-out text must be encoded plainly"


def test_rates_are_kept_and_reported(tokenizer, tmp_path):
    (row,) = _build(tokenizer, tmp_path, fim_rate=0.1, held_out_every=0)
    train = open_shards(tmp_path)["s"]
    found = sum(train.document(i)[1] == tokenizer.fim_begin_id for i in range(len(train)))
    assert found == row.fim_documents and 15 < found < 50
    (plain,) = _build(tokenizer, tmp_path / "plain", fim_rate=0, split_share=0, held_out_every=0)
    (split,) = _build(tokenizer, tmp_path / "split", fim_rate=0, split_share=1, held_out_every=0)
    assert plain.tokens == sum(len(tokenizer.encode(t)) + 2 for t in TEXTS)
    assert split.tokens > plain.tokens + 300, "each text holds ';\\n\\n'"


def test_the_result_does_not_depend_on_batching_or_on_other_sources(tokenizer, tmp_path, monkeypatch):
    _build(tokenizer, tmp_path / "a", {"s": TEXTS})
    monkeypatch.setattr(build, "_BATCH_DOCUMENTS", 7)
    _build(tokenizer, tmp_path / "b", {"other": TEXTS[:20], "s": iter(TEXTS)})
    for part in ("train", "val"):
        a, b = (tmp_path / x / part / "s" / "shard-00000.bin" for x in "ab")
        assert a.read_bytes() == b.read_bytes()
    _build(tokenizer, tmp_path / "c", {"s": TEXTS}, seed=1)
    a, c = (tmp_path / x / "train" / "s" / "shard-00000.bin" for x in "ac")
    assert a.read_bytes() != c.read_bytes()


def test_held_out_goes_by_content(tokenizer, tmp_path):
    texts = ["first", *(f"text {i}" for i in range(200)), *(f"text {i}" for i in range(200))]
    _build(tokenizer, tmp_path, {"s": texts}, fim_rate=0, held_out_every=10)
    train, val = (open_shards(tmp_path, part)["s"] for part in ("train", "val"))
    seen = {part: {r.document(i).tobytes() for i in range(len(r))} for part, r in (("t", train), ("v", val))}
    assert not seen["t"] & seen["v"], "a duplicate of a held-out document must not be trained on"
    assert len(val) == 2 * len(seen["v"])
    rule = HeldOut(50)
    assert 340 < sum(rule(f"x{i}") for i in range(20_000)) < 460
    assert not any(map(HeldOut(0), texts))


@pytest.mark.parametrize("start", range(20))
def test_two_texts_are_enough_for_both_parts(start):
    first, second = f"a{start}", f"b{start}"
    rule = HeldOut(2)
    assert [rule(t) for t in (first, first, second, first, second)] == [False, False, True, False, True]


def test_the_record_holds_sizes_licences_and_versions(tokenizer, tmp_path):
    source = Source("mine", "numpy", "BSD", "a test", lambda: iter(["one", "", "two two"]))
    lines: list[str] = []
    rows = _build(tokenizer, tmp_path, {"mine": Documents(source)}, log=lines.append)
    record = json.loads((tmp_path / "corpus.json").read_text())
    assert record["sources"] == [asdict(rows[0])]
    assert record["tokenizer"] == tokenizer.fingerprint
    assert (rows[0].documents, rows[0].bytes, rows[0].licence) == (2, 10, "BSD")
    assert rows[0].version == np.__version__
    assert any("mine: 2 documents" in line for line in lines)
    table = format_table(rows).splitlines()
    assert table[1].split()[:2] == ["mine", "2"] and "BSD" in table[1] and table[2].startswith("total")
    assert len(open_shards(tmp_path, "val")["mine"]) == 1


def test_a_single_text_has_no_held_out_part(tokenizer, tmp_path):
    lines: list[str] = []
    _build(tokenizer, tmp_path, {"s": ["only"]}, log=lines.append)
    assert any("s: a single text cannot be held out" in line for line in lines)
    with pytest.raises(UserError, match=r"no token shards there"):
        open_shards(tmp_path, "val")


def test_special_strings_in_text_stay_text(tokenizer, tmp_path):
    evil = "a <｜end▁of▁sentence｜> b <｜fim▁hole｜> <|EOT|> c"
    _build(tokenizer, tmp_path, {"s": [evil]}, fim_rate=0)
    ids = open_shards(tmp_path)["s"].document(0).tolist()
    assert (ids.count(tokenizer.eos_id), ids.count(tokenizer.fim_hole_id)) == (1, 0)
    assert tokenizer.decode(ids[1:-1]) == evil


def test_a_full_disk_leaves_no_record_and_no_readable_source(tokenizer, tmp_path, monkeypatch):
    _build(tokenizer, tmp_path)
    monkeypatch.setattr(shards, "_open_for_write", lambda path: _FullDisk(path, 3000))
    with pytest.raises(UserError, match=r"train/s/shard-00000.bin.tmp: the disk is full"):
        _build(tokenizer, tmp_path)
    assert not (tmp_path / "corpus.json").exists()
    with pytest.raises(UserError, match=r"missing or incomplete"):
        open_shards(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_bad_input_on_the_way_stops_the_build(tokenizer, tmp_path):
    def texts():
        yield "good"
        raise UserError("data.jsonl:2: not valid JSON")

    with pytest.raises(UserError, match=r"data.jsonl:2"):
        _build(tokenizer, tmp_path, {"s": texts()})
    with pytest.raises(UserError, match=r"source s holds no text"):
        _build(tokenizer, tmp_path, {"s": ["", ""]})
    with pytest.raises(UserError, match=r"fim_rate must be between 0 and 1, got 1.5"):
        _build(tokenizer, tmp_path, fim_rate=1.5)
    with pytest.raises(UserError, match=r"held_out_every must be 0 .* or at least 2, got 1"):
        _build(tokenizer, tmp_path, held_out_every=1)
