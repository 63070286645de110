"""The user's own files: formats, streaming and the errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.data import user
from examples.data.corpus import load_corpus, user_source
from examples.errors import UserError


def _write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)), "utf-8")
    return path


def test_jsonl(tmp_path):
    path = _write_jsonl(tmp_path / "my data.jsonl", ["one\ntwo", "  ", "drei ä 日本"])
    source = user_source(path)
    assert source.name == "user-my-data"
    assert list(source.load()) == ["one\ntwo", "drei ä 日本"]
    assert list(source.load()) == ["one\ntwo", "drei ä 日本"], "a source must be readable twice"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut of', r"data.jsonl:3: not valid JSON"),
        (b'["text"]', r"data.jsonl:3: .*object with a field 'text', got list"),
        (b'{"txt": "a"}', r"data.jsonl:3: .*field 'text', got fields \['txt'\]"),
        (b'{"text": 5}', r"data.jsonl:3: field 'text' must be a string, got int"),
        (b'{"text": "\xff"}', r"data.jsonl:3: not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "more"}\n')
    documents = user_source(path).load()
    assert next(documents) == "good"
    with pytest.raises(UserError, match=message) as caught:
        next(documents)
    assert "\n" not in str(caught.value)


def test_a_json_line_that_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(user, "LINE_BYTES", 100)
    path = _write_jsonl(tmp_path / "data.jsonl", ["short", "x" * 200])
    with pytest.raises(UserError, match=r"data.jsonl:2: a line may have at most 100 bytes"):
        list(user_source(path).load())


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a\\ud83dz \\ud83d\\ude00"}\n')
    assert list(user_source(path).load()) == ["a\ufffdz \U0001f600"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i}" for i in range(200)] + [None]
    parquet.write_table(pyarrow.table({"text": texts, "n": range(201)}), tmp_path / "a.parquet")
    assert list(user_source(tmp_path / "a.parquet").load()) == texts[:-1]

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: there must be a column 'text', got body"):
        list(user_source(tmp_path / "b.parquet").load())
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet: column 'text' must hold strings, got int64"):
        list(user_source(tmp_path / "c.parquet").load())
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"d.parquet: not a readable parquet file"):
        list(user_source(tmp_path / "d.parquet").load())


@given(st.text(alphabet="ab \n\r\tä日", max_size=400), st.integers(1, 50))
def test_split_text_loses_nothing_and_is_bounded(text, limit):
    pieces = list(user.split_text(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_split_text_prefers_blank_lines_then_lines():
    assert list(user.split_text("one\ntwo\n\nthree\nfour", 14)) == ["one\ntwo\n\n", "three\nfour"]
    assert list(user.split_text("one\ntwo\nthree", 8)) == ["one\ntwo\n", "three"]
    assert list(user.split_text("abcdefgh", 3)) == ["abc", "def", "gh"]


@given(st.lists(st.text(alphabet="aä日😀\n\r ", max_size=60), max_size=20))
def test_text_files_stream_without_loss(tmp_path_factory, paragraphs):
    content = "x" + "\n\n".join(paragraphs)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "TEXT_CHARS", 40)
        patch.setattr(user, "_READ_BYTES", 7)  # cuts inside characters
        pieces = list(user._text(path))
    assert "".join(pieces) == content
    assert all(len(piece) <= 40 for piece in pieces)


def test_a_small_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert list(user_source(tmp_path / "a.md").load()) == ["one\r\n\r\ntwo"]


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 near byte 0"):
        list(user_source(tmp_path / "a.txt").load())


def test_a_folder_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    _write_jsonl(folder / "b.jsonl", ["2", "3"])
    (folder / "a.txt").write_text("1")
    (folder / "sub" / "c.md").write_text("4")
    (folder / "ignored.bin").write_bytes(b"\0")
    assert list(user_source(folder).load()) == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"holds no file that ends in .jsonl"):
        (tmp_path / "empty").mkdir()
        list(user_source(tmp_path / "empty").load())


def test_user_paths_join_the_corpus_or_fail_clearly(tmp_path):
    path = _write_jsonl(tmp_path / "mine.jsonl", ["a"])
    loaded = load_corpus([], user=[path])
    assert list(loaded) == ["user-mine"] and list(loaded["user-mine"]) == ["a"]
    with pytest.raises(UserError, match=r"nothing.jsonl does not exist"):
        load_corpus([], user=[tmp_path / "nothing.jsonl"])
    with pytest.raises(UserError, match=r"two user paths have the same name 'user-mine'"):
        load_corpus([], user=[path, path])
    (tmp_path / "mine.csv").write_text("a")
    with pytest.raises(UserError, match=r"mine.csv: the name must end in .*got '.csv'"):
        list(user_source(tmp_path / "mine.csv").load())
