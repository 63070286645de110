"""Files that are either complete or absent.

Shards, manifests and tokenizers are read by other processes, often after a crash. So every file here is
written under a temporary name, synced, and renamed into place; and every failure of the disk becomes one line
for the user.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(path: Path, doing: str = "writing") -> Iterator[None]:
    """Turn an OSError while `doing` something to `path` into a UserError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: the disk is full ({error.strerror}) while {doing} it; free some space or move it"
            ) from error
        raise UserError(f"{path}: {error.strerror or error} while {doing} it") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced temporary file to its final name, durably."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write the whole of `content` to `path`, or leave `path` as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value, indented so that a person can read it."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in `path`; a file that is absent or damaged is a UserError that names it."""
    with disk_errors(path, "reading"):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); rebuild it") from error
