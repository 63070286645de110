"""A folder of safetensors shards: read with every tensor accounted for; written whole or not at all.

A folder is written under a hidden name beside its place, shard by shard, and renamed when it is complete. A killed
run leaves the hidden folder; the same command finds the shards that are in it, writes the others, and publishes.
`conversion.json` in it says what is being made from what, so that half of one export never meets half of another.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.data.files import disk_errors, read_json, sync_folder, write_json
from examples.errors import UserError
from examples.model.hf.progress import ByteProgress
from examples.model.hf.tensors import Group, Stored, header_of, read_header, write_file

INDEX = "model.safetensors.index.json"
RECORD = "conversion.json"
_SPARE = 16 << 20  # for the small files


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class HfFolder:
    """A local checkpoint in Hugging Face form: `config` (config.json) and the tensors of all its shards, by name.

    Opening reads headers only and raises `UserError` if the index and the shards disagree in anything.
    """

    path: Path
    tensors: dict[str, Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: must be a local folder with config.json and safetensors; there is none"
            )
        index, single = self.path / INDEX, self.path / "model.safetensors"
        if index.exists():
            self._read_indexed(index)
        elif single.exists():
            self.tensors = read_header(single)
        else:
            pickles = sorted(p.name for p in self.path.glob("*.bin")) or sorted(
                p.name for p in self.path.glob("*.pt*")
            )
            why = f" ({pickles[0]} is a pickle, which can run code: not read)" if pickles else ""
            raise UserError(f"{self.path}: has neither {INDEX} nor model.safetensors{why}")

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        values = read_json(self.path / "config.json")
        if not isinstance(values, dict):
            raise UserError(f"{self.path / 'config.json'}: must be a table; got {type(values).__name__}")
        return values

    def _read_indexed(self, index: Path) -> None:
        table = read_json(index)
        weight_map = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index}: must have a table 'weight_map' of file names")
        for file in sorted(set(weight_map.values())):
            if "/" in file or "\\" in file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index}: files must be plain *.safetensors names in this folder; got {file!r}"
                )
            path = self.path / file
            if not path.is_file():
                lost = next(name for name, f in weight_map.items() if f == file)
                raise UserError(f"{path}: is missing; {INDEX} keeps {lost} in it")
            for name, stored in read_header(path).items():
                if weight_map.get(name) != file:
                    where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                    raise UserError(f"{path}: holds {name}, which {INDEX} puts {where}")
                self.tensors[name] = stored
        for name, file in weight_map.items():
            if name not in self.tensors:
                raise UserError(f"{self.path / file}: lacks {name}, which {INDEX} puts there")
        listed = set(weight_map.values())
        extra = sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in listed)
        if extra:
            raise UserError(f"{self.path / extra[0]}: is not in {INDEX}; is the folder a mix of two?")

    def identity(self) -> dict[str, Any]:
        """What tells this folder from another or an older one without reading its bytes: JSON."""
        files = sorted({stored.file for stored in self.tensors.values()})
        return {
            "folder": str(self.path.resolve()),
            "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
        }


# --- writing --------------------------------------------------------------------------------------------------------


def split_into_shards(groups: Sequence[Group], shard_bytes: int) -> dict[str, list[Group]]:
    """File name -> groups, in order; a shard exceeds `shard_bytes` only where one group does. Names as released."""
    if shard_bytes < 1:
        raise UserError(f"--shard-size: must be at least 1 byte; got {shard_bytes}")
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_of(shards: dict[str, list[Group]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {o.name: file for file, groups in shards.items() for g in groups for o in g.outputs}
    total = sum(group.nbytes for groups in shards.values() for group in groups)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_folder(
    target: Path,
    shards: dict[str, list[Group]],
    record: dict[str, Any],
    finish: Callable[[Path], None],
    *,
    fresh: bool = False,
    quiet: bool = False,
) -> Path:
    """Write `shards` into the new folder `target`; shards that an interrupted call has finished stay as they are.

    record: JSON, what is made from what; `finish(folder)` writes the small files, at the end. fresh: forget what an
    interrupted call left. Raises `UserError` if `target` exists, another process writes it, what was left is of another
    record, or the disk is or will be full.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists; choose a new folder, or delete it")
    partial = target.with_name(f".{target.name}.partial")
    record = json.loads(json.dumps(record))
    with disk_errors(target), _only_writer(partial):
        if fresh:
            for leftover in partial.iterdir():
                leftover.unlink()
        _continue_or_begin(partial, record)
        wanted = {name: header_of(groups)[0] for name, groups in shards.items()}
        sizes = {name: len(wanted[name]) + sum(g.nbytes for g in groups) for name, groups in shards.items()}
        done = {name for name in shards if _is_done(partial / name, wanted[name], sizes[name])}
        for stale in partial.glob("*.safetensors*"):
            if stale.name not in done:
                stale.unlink()
        _check_space(partial, sum(size for name, size in sizes.items() if name not in done) + _SPARE)
        progress = ByteProgress(sum(g.nbytes for s in shards.values() for g in s), quiet=quiet)
        if done:
            progress.skip(sum(g.nbytes for name in done for g in shards[name]), len(done))
        for number, (name, groups) in enumerate(shards.items(), 1):
            if name not in done:
                progress.start(f"{name} ({number}/{len(shards)})")
                write_file(partial / name, groups, progress.add)
        finish(partial)
        sync_folder(partial)
        os.rename(partial, target)
        sync_folder(target.parent)
        progress.finish()
    return target


@contextlib.contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)  # the kernel drops the lock with the process
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is writing it") from None
        yield
    finally:
        os.close(handle)


def _continue_or_begin(partial: Path, record: dict[str, Any]) -> None:
    file = partial / RECORD
    if file.exists():
        found = read_json(file)
        if found != record:
            keys = [k for k in record.keys() | found.keys() if record.get(k) != found.get(k)]
            raise UserError(
                f"{partial}: an interrupted command left it with other {', '.join(sorted(keys))}; "
                "repeat that command, or pass --fresh to begin again"
            )
    else:
        write_json(file, record)


def _is_done(file: Path, header: bytes, size: int) -> bool:
    """A shard has its final name only when it was synced, so its header and length tell all."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as handle:
        return handle.read(len(header)) == header


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free; "
            "free some space and run the same command again"
        )
