"""One safetensors file, without ever holding it: read by byte ranges, written in a stream.

The library maps a file and hands out whole tensors, and writes from a dictionary of all of them. For 671B parameters
that is a shard (5 GB) or a fused expert matrix (15 GB) at a time; here it is one block. The format is simple enough: a
length, a JSON header, bytes. A file is written under another name, synced, and renamed: what has its name is whole.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from examples.data.files import disk_errors, publish
from examples.errors import UserError

BLOCK_BYTES = 16 << 20  # of a tensor, in memory at a time
_LONGEST_HEADER = 100_000_000  # the library's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start: of its bytes in the file. offsets: of this part in the whole (sharded checkpoints)."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    offsets: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, index: int) -> Stored:
        """One index of the first axis as a tensor of its own (one expert of a fused matrix)."""
        assert 0 <= index < self.shape[0]
        place = self.start + index * self.row_bytes
        return replace(self, shape=self.shape[1:], start=place, offsets=self.offsets[1:])

    def read(self, start: int = 0, rows: int | None = None) -> torch.Tensor:
        """Rows `start` .. `start + rows` of the first axis, a fresh CPU tensor; all by default."""
        if not self.shape:
            return _read(self.file, self.name, self.start, self.nbytes).view(self.dtype).view(())
        rows = self.shape[0] - start if rows is None else rows
        assert start >= 0 and start + rows <= self.shape[0]
        data = _read(self.file, self.name, self.start + start * self.row_bytes, rows * self.row_bytes)
        return data.view(self.dtype).view(rows, *self.shape[1:])


def row_blocks(rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of about `BLOCK_BYTES`, a multiple of `multiple` rows except the last."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _read(file: Path, name: str, start: int, length: int) -> torch.Tensor:
    data = torch.empty(length, dtype=torch.uint8)
    window = memoryview(data.numpy())
    with disk_errors(file, f"reading {name} from"), open(file, "rb", buffering=0) as handle:
        handle.seek(start)
        done = 0
        while done < length:
            count = handle.readinto(window[done:])
            if not count:
                raise UserError(
                    f"{file}: {name}: the file ended {length - done} bytes early; was it truncated?"
                )
            done += count
    return data


# --- reading the header ---------------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a file; `UserError` unless the header is sound and covers the file exactly."""
    with disk_errors(file, "reading"):
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0] if size >= 8 else -1
            if not 0 <= length <= min(size - 8, _LONGEST_HEADER):
                raise UserError(
                    f"{file}: not a safetensors file, or truncated inside its header ({size} bytes)"
                )
            content = handle.read(length)
    try:
        table = json.loads(content)
        metadata = table.pop("__metadata__", None) or {}
        parts = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
        entries = sorted(table.items(), key=lambda item: item[1]["data_offsets"])
        found: dict[str, Stored] = {}
        end = 0
        for name, entry in entries:
            first, last = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{file}: {name}: type must be one of {', '.join(DTYPES)}; got {entry['dtype']}"
                )
            shape = tuple(int(n) for n in entry["shape"])
            offsets = tuple(parts.get(name, {}).get("saved_offsets", ()))
            stored = Stored(file, name, DTYPES[entry["dtype"]], shape, 8 + length + first, offsets)
            if first != end or last - first != stored.nbytes or min(shape, default=0) < 0:
                raise UserError(f"{file}: {name}: the header's shape and byte range disagree")
            end = last
            found[name] = stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its safetensors header is damaged ({error})") from None
    if 8 + length + end != size:
        raise UserError(
            f"{file}: is truncated or extended, {size} bytes where its header promises {8 + length + end}"
        )
    return found


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are made together: `make` yields (name, next part); a tensor's parts in order are its bytes."""

    outputs: tuple[Output, ...]
    make: Callable[[], Iterable[tuple[str, torch.Tensor]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(output.nbytes for output in self.outputs)


def header_of(groups: Sequence[Group]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(header with its length, byte range of each tensor in the file). Wide types first, so that all are aligned."""
    outputs = sorted((o for g in groups for o in g.outputs), key=lambda o: -o.dtype.itemsize)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        if output.name in table:
            raise ValueError(f"{output.name} occurs twice in one file")
        table[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    content = json.dumps(table, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    header = struct.pack("<Q", len(content)) + content
    ranges = {
        o.name: tuple(len(header) + n for n in table[o.name]["data_offsets"])  # type: ignore[index]
        for o in outputs
    }
    return header, ranges  # type: ignore[return-value]


def write_file(path: Path, groups: Sequence[Group], progress: Callable[[int], None]) -> None:
    """Write the tensors of `groups` to `path`, atomically; `progress` is told of bytes as they are written."""
    header, ranges = header_of(groups)
    cursor = {name: start for name, (start, _) in ranges.items()}
    types = {output.name: output.dtype for group in groups for output in group.outputs}
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb", buffering=0) as file:
                _write(file, header)
                for group in groups:
                    for name, part in group.make():
                        assert part.dtype == types[name], (name, part.dtype)
                        data = part.contiguous().view(-1).view(torch.uint8)
                        if cursor[name] + data.numel() > ranges[name][1]:
                            raise AssertionError(f"{name}: more values than its shape has")
                        file.seek(cursor[name])
                        _write(file, memoryview(data.numpy()))
                        cursor[name] += data.numel()
                        progress(data.numel())
                for name, (_, end) in ranges.items():
                    if cursor[name] != end:
                        raise AssertionError(f"{name}: {end - cursor[name]} bytes fewer than its shape has")
                os.fsync(file.fileno())
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _write(file: Any, data: bytes | memoryview) -> None:
    window = memoryview(data)
    while window:
        window = window[file.write(window) :]
