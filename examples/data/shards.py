"""Tokens on disk: memory-mapped uint32 shards with a document index, complete or absent.

A run of weeks reads these files from many processes, so a file must be addressable by document without being
read, must
say which tokenizer made it, and must never look complete when it is not. One shard is one file:

    header (128 bytes) | tokens, uint32 | 4 bytes of zero if their number is odd | end of each document,
    uint64

and one folder per source holds shards and `manifest.json`, which is written last: no manifest, no data.
`token_bytes.npy` beside them tells how many bytes of text each id stands for, so that held-out loss can be
given in bits per byte.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from examples.data.files import disk_errors, publish, read_json, write_atomic, write_json
from examples.errors import UserError

MAGIC = b"DSOSHARD"
VERSION = 1
HEADER_BYTES = 128
# magic, version, spare, tokens, documents, crc32 of content, SHA-256 of tokenizer; the header's own crc32
# ends it.
_HEADER = struct.Struct("<8sIIQQI32s")
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
# How much of the mapped files may become resident before the pages are given back; each access counts at
# least what the kernel maps around a fault.
_RESIDENT_BYTES = 16 << 20
_FAULT_BYTES = 64 << 10


@dataclass(frozen=True)
class Header:
    """What the first bytes of a shard say."""

    tokens: int
    documents: int
    crc: int
    fingerprint: str

    def pack(self) -> bytes:
        body = _HEADER.pack(
            MAGIC, VERSION, 0, self.tokens, self.documents, self.crc, bytes.fromhex(self.fingerprint)
        ).ljust(HEADER_BYTES - 4, b"\0")
        return body + struct.pack("<I", zlib.crc32(body))

    @property
    def index_start(self) -> int:
        return HEADER_BYTES + 4 * (self.tokens + self.tokens % 2)

    @property
    def file_bytes(self) -> int:
        return self.index_start + 8 * self.documents

    @staticmethod
    def read(path: Path) -> Header:
        """The header of a shard, checked against the file's size."""
        with disk_errors(path, "reading"), open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if raw[: len(MAGIC)] != MAGIC[: len(raw)] or not raw:
            raise UserError(
                f"{path}: not a token shard: it must start with {MAGIC!r}, got {raw[: len(MAGIC)]!r}"
            )
        if len(raw) < HEADER_BYTES:
            raise UserError(f"{path}: truncated: a shard has at least {HEADER_BYTES} bytes, got {size}")
        _, version, _, tokens, documents, crc, digest = _HEADER.unpack_from(raw)
        if version != VERSION:
            raise UserError(f"{path}: shard version must be {VERSION}, got {version}; rebuild the shards")
        if zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
            raise UserError(f"{path}: the header is damaged (checksum differs); rebuild the shards")
        header = Header(tokens, documents, crc, digest.hex())
        if size != header.file_bytes:
            what = "truncated" if size < header.file_bytes else "too long"
            raise UserError(
                f"{path}: {what}: the header promises {header.file_bytes} bytes, the file has {size}"
            )
        return header


def _open_for_write(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=1 << 20)


class ShardWriter:
    """Streams documents of one source into shards of at most `max_tokens_per_shard` (a longer document has
    its own).

    Use as a context manager: leaving it normally publishes the manifest; leaving it by an exception removes
    what was under way. Older shards in `directory` are replaced, their manifest is removed first.
    """

    def __init__(
        self,
        directory: str | Path,
        source: str,
        tokenizer_fingerprint: str,
        max_tokens_per_shard: int = 1 << 24,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        if max_tokens_per_shard < 1:
            raise UserError(f"max_tokens_per_shard must be at least 1, got {max_tokens_per_shard}")
        self.directory, self.source = Path(directory), source
        self.fingerprint, self.max_tokens = tokenizer_fingerprint, max_tokens_per_shard
        self.tokens = self.documents = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / MANIFEST).unlink(missing_ok=True)
            for old in self.directory.glob("shard-*"):
                old.unlink()
        if token_bytes is not None:
            buffer = io.BytesIO()
            np.save(buffer, token_bytes)
            write_atomic(self.directory / TOKEN_BYTES, buffer.getvalue())

    def add(self, ids: np.ndarray) -> None:
        """Append one document: [n] ids, n >= 1."""
        if not len(ids):
            raise ValueError("a document must have at least one token")
        if self._file is not None and self._ends[-1] + len(ids) > self.max_tokens:
            self._finish_shard()
        with disk_errors(self._temporary):
            if self._file is None:
                self._file, self._crc = _open_for_write(self._temporary), 0
                self._ends: list[int] = []
                self._file.write(bytes(HEADER_BYTES))
            self._write(np.ascontiguousarray(ids, dtype="<u4").tobytes())
        self._ends.append((self._ends[-1] if self._ends else 0) + len(ids))
        self.tokens += len(ids)
        self.documents += 1

    def close(self) -> None:
        """Finish the last shard, then publish the manifest: from here on the folder is complete."""
        if self._file is not None:
            self._finish_shard()
        manifest = {
            "format": "deepseek_ops.shards",
            "version": VERSION,
            "source": self.source,
            "tokenizer": self.fingerprint,
            "tokens": self.tokens,
            "documents": self.documents,
            "shards": self._shards,
        }
        write_json(self.directory / MANIFEST, manifest)

    def abort(self) -> None:
        """Drop the shard under way. Without a manifest the folder stays incomplete."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # flushes what is buffered: may fail again on a full disk
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()  # does nothing after a clean close

    @property
    def _path(self) -> Path:
        return self.directory / f"shard-{len(self._shards):05d}.bin"

    @property
    def _temporary(self) -> Path:
        return self._path.with_suffix(".bin.tmp")

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._crc = zlib.crc32(content, self._crc)

    def _finish_shard(self) -> None:
        assert self._file is not None
        tokens = self._ends[-1]
        with disk_errors(self._temporary):
            self._write(b"\0" * (4 * (tokens % 2)))
            self._write(np.array(self._ends, dtype="<u8").tobytes())
            header = Header(tokens, len(self._ends), self._crc, self.fingerprint)
            self._file.seek(0)
            self._file.write(header.pack())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            publish(self._temporary, self._path)
        entry = {"file": self._path.name, "tokens": tokens, "documents": len(self._ends), "crc32": self._crc}
        self._file = None
        self._shards.append(entry)


class ShardReader:
    """The documents of one source by number: `len(reader)`, `reader.document(i)`, `reader.length(i)`.

    Opening checks every header against the manifest and the file's size, and against `tokenizer_fingerprint`
    if given; `verify()` also reads the content. Resident memory stays bounded: mapped pages are given back as
    they are used.
    """

    def __init__(self, directory: str | Path, tokenizer_fingerprint: str | None = None) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.exists():
            raise UserError(
                f"{self.directory}: no {MANIFEST}: the shards are missing or incomplete; build them"
            )
        manifest = read_json(path)
        if manifest.get("format") != "deepseek_ops.shards" or manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: must be format deepseek_ops.shards version {VERSION}, "
                f"got {manifest.get('format')} version {manifest.get('version')}"
            )
        self.source: str = manifest["source"]
        self.fingerprint: str = manifest["tokenizer"]
        self.tokens: int = manifest["tokens"]
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != self.fingerprint:
            raise UserError(
                f"{path}: the shards were made with tokenizer {self.fingerprint}, "
                f"this run uses {tokenizer_fingerprint}"
            )
        self._paths: list[Path] = []
        self._headers: list[Header] = []
        self._first = [0]  # number of the first document of each shard, and the total
        for entry in manifest["shards"]:
            shard = self.directory / entry["file"]
            header = Header.read(shard)
            expected = Header(entry["tokens"], entry["documents"], entry["crc32"], self.fingerprint)
            if header != expected:
                raise UserError(f"{shard}: the header must agree with {MANIFEST}: {expected}, got {header}")
            self._paths.append(shard)
            self._headers.append(header)
            self._first.append(self._first[-1] + header.documents)
        self._maps: list[tuple[mmap.mmap, np.ndarray, np.ndarray] | None] = [None] * len(self._paths)
        self._touched = 0

    def __len__(self) -> int:
        return self._first[-1]

    def length(self, i: int) -> int:
        """Tokens of document `i`, from the index alone."""
        _, _, start, end = self._locate(i)
        return end - start

    def document(self, i: int) -> np.ndarray:
        """[length] uint32, a read-only view into the file."""
        _, tokens, start, end = self._locate(i)
        self._account(4 * (end - start))
        return tokens[start:end]

    def verify(self) -> None:
        """Read every shard and compare its checksum; the damaged one is named."""
        for path, header in zip(self._paths, self._headers, strict=True):
            crc = 0
            with disk_errors(path, "reading"), open(path, "rb") as file:
                file.seek(HEADER_BYTES)
                while block := file.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            if crc != header.crc:
                raise UserError(
                    f"{path}: damaged: checksum must be {header.crc:#010x}, the content has {crc:#010x}"
                )

    @property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocabulary]: bytes of text per token id."""
        path = self.directory / TOKEN_BYTES
        with disk_errors(path, "reading"):
            return np.load(path)

    def _locate(self, i: int) -> tuple[int, np.ndarray, int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        shard = bisect_right(self._first, i) - 1
        opened = self._maps[shard]
        if opened is None:
            opened = self._maps[shard] = self._open(shard)
        _, tokens, ends = opened
        k = i - self._first[shard]
        self._account(0)
        return shard, tokens, int(ends[k - 1]) if k else 0, int(ends[k])

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray, np.ndarray]:
        header = self._headers[shard]
        with disk_errors(self._paths[shard], "reading"), open(self._paths[shard], "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tokens = np.frombuffer(mapped, dtype="<u4", count=header.tokens, offset=HEADER_BYTES)
        ends = np.frombuffer(mapped, dtype="<u8", count=header.documents, offset=header.index_start)
        return mapped, tokens, ends

    def _account(self, used: int) -> None:
        """Give mapped pages back once enough of them may be resident; views stay valid and fault them in
        again."""
        self._touched += used + _FAULT_BYTES
        if self._touched > _RESIDENT_BYTES:
            self._touched = 0
            for opened in self._maps:
                if opened is not None:
                    opened[0].madvise(mmap.MADV_DONTNEED)
