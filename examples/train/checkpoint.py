"""Checkpoints that are either complete or absent, and that refuse to load when a single bit is wrong.

    run_dir/checkpoints/step-00000300/
        shard-00001-model-00001-of-00001.safetensors    tensors, one file per rank
        meta.json                                       loader state, RNG, schedules, anything that is JSON
        manifest.json                                   size and SHA-256 of every file, and of itself; written last

Tensors go through torch.distributed.checkpoint with its safetensors storage: the same call saves one process or the
shards of many ranks (DTensor), and loading reshards. We do not use DCP's default storage because its `.metadata` file
is a pickle: opening a stranger's checkpoint would run a stranger's code. Here loading parses JSON and safetensors
headers only, and only after the checksums agreed.

A save writes into a hidden folder, syncs everything, renames, syncs the parent, and only then removes old
checkpoints. So a kill or a full disk at any moment leaves the previous checkpoint as it was. A lock that the kernel
drops with the process tells which hidden folders belong to dead savers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from examples.data.files import disk_errors, sync_folder
from examples.errors import UserError

FORMAT = "deepseek_ops checkpoint 1"
_NAME = re.compile(r"step-\d{8,}(-\d+)?$")  # the second number: the step was saved again
_HIDDEN = (".saving-", ".trash-")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns. `tensors` is `into`, filled, or fresh nested dicts of CPU tensors."""

    path: Path
    step: int
    tensors: dict[str, Any]
    meta: dict[str, Any]


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Any], meta: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write `run_dir/checkpoints/step-...` and return its path; then remove all but the newest `keep`.

    tensors: nested dicts of tensors of any dtype safetensors knows, on any device; saved bit for bit.
    meta:    JSON: dicts with string keys, lists, strings, numbers, booleans, None.

    Under torch.distributed every rank calls this; plain tensors count as replicated, DTensors as sharded.
    Raises `UserError` on a full disk, when another process is saving, or when the run holds a later step.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step and keep must be at least 0 and 1; got {step} and {keep}")
    flat = {name: t.detach().contiguous() for name, t in _flatten(tensors).items()}
    _check_json(meta, "meta")
    folder = Path(run_dir) / "checkpoints"
    with contextlib.ExitStack() as stack:
        temporary = Path(_on_first_rank(lambda: str(_begin(folder, step, stack))))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # nothing is there after a success
        with _dcp_errors(temporary):
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(flat, storage_writer=writer, no_dist=not _distributed())
        return Path(_on_first_rank(lambda: str(_finish(folder, temporary, step, meta, keep))))


def load_latest(run_dir: Path, *, into: dict[str, Any] | None = None) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none. A damaged one is an error, not skipped in silence."""
    found = list_checkpoints(run_dir)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1], into=into)
    except UserError as error:
        if len(found) == 1:
            raise
        raise UserError(f"{error}; to go back to {found[-2].name}, delete {found[-1]}") from error


def load_checkpoint(path: Path, *, into: dict[str, Any] | None = None) -> Checkpoint:
    """Verify `path` and load it.

    into: nested dicts of tensors to fill in place (names, shapes and dtypes must agree, which is checked before
          the first copy); without it, tensors are allocated on the CPU.

    Raises `UserError` with the reason if the folder is missing, foreign, truncated, altered, or does not fit `into`.
    """
    path = Path(path)
    step = int(_on_first_rank(lambda: verify_checkpoint(path)))
    reader = HuggingFaceStorageReader(str(path))
    with _dcp_errors(path, "reading"):
        stored = reader.read_metadata().state_dict_metadata
    wanted = None if into is None else _flatten(into)
    if wanted is None:
        flat = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}  # type: ignore[union-attr]
    else:
        _check_fit(path, stored, wanted)
        flat = wanted
    if flat:
        with _dcp_errors(path, "reading"):
            dcp.load(flat, storage_reader=reader, no_dist=not _distributed())
    meta = json.loads((path / "meta.json").read_bytes())
    return Checkpoint(path, step, _unflatten(flat) if into is None else into, meta)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    complete = [p for p in folder.iterdir() if _NAME.match(p.name) and p.is_dir()]
    return sorted(complete, key=lambda p: (_step_of(p), _revision_of(p)))


def _begin(folder: Path, step: int, stack: contextlib.ExitStack) -> Path:
    """Lock the folder until `stack` closes, remove what dead savers left, and make the hidden folder."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(folder / ".lock", "w"))  # noqa: SIM115 (held until the stack closes)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is saving a checkpoint of this run") from None
        for leftover in folder.iterdir():
            if leftover.name.startswith(_HIDDEN):
                shutil.rmtree(leftover, ignore_errors=True)
        newest = list_checkpoints(folder.parent)[-1:]
        if newest and _step_of(newest[0]) > step:
            raise UserError(
                f"{newest[0]}: is later than step {step}, which is being saved; delete it or use another run folder"
            )
        temporary = folder / f"{_HIDDEN[0]}{step:08d}-{secrets.token_hex(4)}"
        temporary.mkdir()
        return temporary


def _finish(folder: Path, temporary: Path, step: int, meta: Mapping[str, Any], keep: int) -> Path:
    """Seal the hidden folder with its manifest, publish it, remove old checkpoints."""
    with disk_errors(temporary):
        seal_checkpoint(temporary, step, meta)
        same_step = [p for p in list_checkpoints(folder.parent) if _step_of(p) == step]
        revision = f"-{_revision_of(same_step[-1]) + 1}" if same_step else ""
        path = folder / f"step-{step:08d}{revision}"
        os.rename(temporary, path)
        sync_folder(folder)
    for old in list_checkpoints(folder.parent)[:-keep]:
        trash = folder / f"{_HIDDEN[1]}{old.name}"  # a half deleted checkpoint must not look like one
        with contextlib.suppress(OSError):
            os.rename(old, trash)
            shutil.rmtree(trash)
    return path


def seal_checkpoint(folder: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Write meta.json and, over everything in `folder`, manifest.json: what makes tensors a checkpoint."""
    for file in folder.glob("*.safetensors"):
        _sort_metadata(file)
    _write(folder / "meta.json", json.dumps(meta, indent=1).encode())
    files = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(handle)}
    manifest = {"format": FORMAT, "step": step, "files": files}
    seal = hashlib.sha256(_canonical(manifest)).hexdigest()
    _write(folder / "manifest.json", json.dumps({**manifest, "sha256": seal}, indent=1).encode())
    sync_folder(folder)


def _sort_metadata(file: Path) -> None:
    """safetensors writes the metadata of a file in an order that each process draws; sorted, equal checkpoints are equal files."""
    with open(file, "r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        ordered = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False)
        if len(content := ordered.encode().ljust(length)) == length:
            handle.seek(8)
            handle.write(content)


def verify_checkpoint(path: Path) -> int:
    """Check every byte against the manifest; the step of the checkpoint. `UserError` says what is wrong."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        seal = manifest.pop("sha256")
        intact = seal == hashlib.sha256(_canonical(manifest)).hexdigest()
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
        step = int(manifest["step"])
    except FileNotFoundError:
        raise UserError(f"{path}: not a checkpoint of examples.train, it has no manifest.json") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: manifest.json is damaged or foreign") from None
    if not intact:
        raise UserError(f"{path}: manifest.json was altered, its checksum does not agree")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    for name, (length, digest) in {"meta.json": (0, ""), **files}.items():
        file = path / name
        if not file.is_file() or not digest:
            raise UserError(f"{path}: {name} is missing")
        size = file.stat().st_size
        if size != length:
            raise UserError(f"{path}: {name} is truncated or extended, {size} bytes instead of {length}")
        with disk_errors(file, "reading"), open(file, "rb") as handle:
            if _sha256(handle) != digest:
                raise UserError(f"{path}: {name} is corrupt, its SHA-256 does not agree with the manifest")
    extra = sorted(p.name for p in path.glob("*.safetensors") if p.name not in files)
    if extra:
        raise UserError(f"{path}: {extra[0]} does not belong to this checkpoint")
    return step


def _check_fit(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    for word, names in (("lacks", wanted.keys() - stored.keys()), ("has", stored.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            whom = "" if word == "lacks" else ", which this run does not use"
            raise UserError(
                f"{path}: {word} the tensor {min(names)!r}{more}{whom}; is it another configuration?"
            )
    for name, tensor in wanted.items():
        have, want = (
            (tuple(stored[name].size), stored[name].properties.dtype),
            (tuple(tensor.shape), tensor.dtype),
        )
        if have != want:
            raise UserError(
                f"{path}: {name!r} is {_describe(*have)} in the checkpoint and {_describe(*want)} in this run"
            )


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise TypeError(
                f"tensors: a key must be a string without '/'; got {key!r} under {prefix or 'the top'!r}"
            )
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, Tensor):
            flat[prefix + key] = value
        else:
            raise TypeError(
                f"tensors: {prefix}{key} must be a tensor or a dict; got {type(value).__name__} (use meta)"
            )
    return flat


def _unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    return tree


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON keys are strings; got {key!r}")
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check_json(inner, f"{where}[{i}]")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(f"{where}: must be JSON; got {type(value).__name__}")


def _canonical(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _sha256(handle: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _revision_of(path: Path) -> int:
    return int([*path.name.split("-"), "1"][2])


@contextlib.contextmanager
def _dcp_errors(path: Path, doing: str = "writing") -> Iterator[None]:
    """DCP wraps what went wrong on each rank; give the user the cause."""
    with disk_errors(path, doing), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, OSError):
                raise cause from error
            raise UserError(f"{path}: rank {rank} failed while {doing} it: {cause}") from error


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _on_first_rank(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0; every rank gets its result, or the UserError that it raised."""
    if not _distributed():
        return work()
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:  # noqa: BLE001 (raised below; the others must not wait for an answer that never comes)
            failure = error
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]
