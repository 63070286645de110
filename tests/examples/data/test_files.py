"""Files are complete or as they were before; a failing disk is one line."""

from __future__ import annotations

import errno
import os

import pytest

from examples.data import files
from examples.errors import UserError


def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "value.json"
    files.write_json(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"value.json: the disk is full .* while writing it"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent.json: No such file or directory while reading it"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"a"')
    with pytest.raises(UserError, match=r"bad.json: not valid JSON"):
        files.read_json(tmp_path / "bad.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"value.json: .* while writing it"):
        files.write_json(tmp_path / "file" / "value.json", {})
