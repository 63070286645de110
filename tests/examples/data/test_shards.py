"""Shards: what is written is read, and nothing damaged, foreign or half written is accepted."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.data import shards
from examples.data.shards import HEADER_BYTES, MANIFEST, ShardReader, ShardWriter
from examples.errors import UserError

FINGERPRINT = "0123456789abcdef" * 4


def _write(folder: Path, documents: list[list[int]], per_shard: int = 10) -> ShardReader:
    with ShardWriter(folder, "s", FINGERPRINT, per_shard) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.uint32))
    return ShardReader(folder, FINGERPRINT)


_IDS = st.integers(0, 2**32 - 1)


@given(st.lists(st.lists(_IDS, min_size=1, max_size=13), max_size=12), st.integers(1, 12))
def test_round_trip(tmp_path_factory, documents, per_shard):
    folder = tmp_path_factory.mktemp("shards")
    reader = _write(folder, documents, per_shard)
    assert len(reader) == len(documents)
    assert [reader.document(i).tolist() for i in range(len(reader))] == documents
    assert [reader.length(i) for i in range(len(reader))] == [len(d) for d in documents]
    assert reader.tokens == sum(map(len, documents))
    reader.verify()
    for entry in json.loads((folder / MANIFEST).read_text())["shards"]:
        assert entry["tokens"] <= per_shard or entry["documents"] == 1


def test_documents_are_views_and_out_of_range_is_an_error(tmp_path):
    reader = _write(tmp_path, [[1, 2], [3]])
    assert not reader.document(0).flags.writeable and not reader.document(0).flags.owndata
    for i in (-1, 2):
        with pytest.raises(IndexError):
            reader.document(i)


def test_layout_is_the_documented_one(tmp_path):
    _write(tmp_path, [[7, 8, 9]])
    raw = (tmp_path / "shard-00000.bin").read_bytes()
    assert raw[:8] == b"DSOSHARD" and raw[36 : 36 + 32].hex() == FINGERPRINT
    assert raw[HEADER_BYTES:].hex() == "070000000800000009000000000000000300000000000000"


def test_rebuilding_replaces_older_shards(tmp_path):
    _write(tmp_path, [[1] * 9] * 5)
    reader = _write(tmp_path, [[2]])
    assert len(reader) == 1 and sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, "shard-00000.bin"]


@pytest.mark.parametrize("size", [0, 5, 100, HEADER_BYTES, HEADER_BYTES + 11, -1])
def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path, size):
    _write(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / "shard-00000.bin"
    full = path.stat().st_size
    os.truncate(path, full - 1 if size < 0 else size)
    with pytest.raises(UserError, match=r"shard-00000.bin: (truncated|not a token shard)") as caught:
        ShardReader(tmp_path)
    if size >= HEADER_BYTES:
        assert f"promises {full} bytes, the file has {size}" in str(caught.value)


def test_a_longer_file_is_refused(tmp_path):
    _write(tmp_path, [[1, 2, 3]])
    with open(tmp_path / "shard-00000.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"too long: the header promises"):
        ShardReader(tmp_path)


def _patch(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGUF", r"must start with b'DSOSHARD', got b'GGUFHARD'"),
        (8, b"\x02", "shard version must be 1, got 2"),
        (40, b"\xff", "the header is damaged"),
        (70, b"\xff", "the header is damaged"),
    ],
)
def test_a_foreign_or_damaged_header_is_refused(tmp_path, at, value, message):
    _write(tmp_path, [[1, 2, 3]])
    _patch(tmp_path / "shard-00000.bin", at, value)
    with pytest.raises(UserError, match=message):
        ShardReader(tmp_path)


@pytest.mark.parametrize("at", [HEADER_BYTES, HEADER_BYTES + 9, HEADER_BYTES + 17])
def test_verify_finds_a_flipped_bit(tmp_path, at):
    reader = _write(tmp_path, [[1, 2, 3], [5] * 9])
    _patch(tmp_path / "shard-00000.bin", at, b"\x40")
    with pytest.raises(
        UserError, match=r"shard-00000.bin: damaged: checksum must be 0x.*, the content has 0x"
    ):
        reader.verify()


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    _write(tmp_path, [[1]])
    with pytest.raises(UserError, match=f"manifest.json: .*{FINGERPRINT}, this run uses {'f' * 64}"):
        ShardReader(tmp_path, "f" * 64)


def test_a_shard_of_another_build_is_refused(tmp_path):
    _write(tmp_path / "a", [[1, 2]])
    _write(tmp_path / "b", [[3, 4]])
    os.replace(tmp_path / "b" / "shard-00000.bin", tmp_path / "a" / "shard-00000.bin")
    with pytest.raises(UserError, match=r"the header must agree with manifest.json"):
        ShardReader(tmp_path / "a")
    (tmp_path / "a" / "shard-00000.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00000.bin: No such file"):
        ShardReader(tmp_path / "a")


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    writer = ShardWriter(tmp_path, "s", FINGERPRINT, 4)
    for _ in range(5):
        writer.add(np.arange(3, dtype=np.uint32))
    # No close: as after kill -9. Finished shards are there and valid, the last one has another name, no
    # manifest.
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"shard-0000{i}.bin" for i in range(4)] + ["shard-00004.bin.tmp"]
    with pytest.raises(UserError, match=r"no manifest.json: the shards are missing or incomplete"):
        ShardReader(tmp_path)
    assert len(_write(tmp_path, [[1]])) == 1, "a new build must clean up"
    assert not list(tmp_path.glob("*.tmp"))


def test_an_error_in_the_source_removes_the_shard_under_way(tmp_path):
    with pytest.raises(RuntimeError, match=r"source"), ShardWriter(tmp_path, "s", FINGERPRINT) as writer:
        writer.add(np.arange(3, dtype=np.uint32))
        raise RuntimeError("source")
    assert not list(tmp_path.iterdir())


class _FullDisk:
    """A file on a disk that takes `room` bytes: what it cannot take fails as the kernel would."""

    def __init__(self, path: Path, room: int) -> None:
        self._file, self._room = open(path, "wb", buffering=0), room  # noqa: SIM115

    def write(self, content: bytes) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize(
    "room", [0, HEADER_BYTES, 4000, HEADER_BYTES + 8 * 4000, HEADER_BYTES + 8 * 4000 + 8]
)
def test_a_full_disk_is_one_line_and_leaves_no_shard(tmp_path, monkeypatch, room):
    monkeypatch.setattr(shards, "_open_for_write", lambda path: _FullDisk(path, room))
    with pytest.raises(UserError, match=r"shard-00000.bin.tmp: the disk is full") as caught:
        _write(tmp_path, [[1] * 4000, [2] * 4000], 10_000)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_really_full_disk(tmp_path):
    """The same on a file system of one megabyte, where the kernel allows it: buffered data fails late
    there."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(UserError, match=r"the disk is full"):
            _write(tmp_path / "out", [[1] * 50_000] * 10, 150_000)
        left = sorted(p.name for p in (tmp_path / "out").iterdir())
        assert left == ["shard-00000.bin"], "the finished shard may stay, without a manifest"
        with pytest.raises(UserError, match=r"missing or incomplete"):
            ShardReader(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_resident_pages_are_given_back(tmp_path, monkeypatch):
    reader = _write(tmp_path, [[i] * 1000 for i in range(40)], 4000)
    given_back = []
    monkeypatch.setattr(shards, "_RESIDENT_BYTES", 400_000)

    class Mapped:
        def __init__(self, mapped):
            self._mapped = mapped

        def madvise(self, advice):
            given_back.append(advice)
            self._mapped.madvise(advice)

    real = reader._open
    monkeypatch.setattr(reader, "_open", lambda s: (Mapped(real(s)[0]), *real(s)[1:]))
    views = [reader.document(i) for i in range(40)]
    assert len(given_back) > 10
    assert [v[0] for v in views] == list(range(40)), "views must stay valid"
