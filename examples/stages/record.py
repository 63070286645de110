"""What a stage's folder says about itself: what made it, out of what, and what came out.

    stage.json   when it begins: the whole configuration, its inputs with their digests, seeds, code, torch, threads, command
    done.json    when it ends: result, digest of the output, seconds, peak memory

So a folder tells its story alone, wherever it is copied, and `python -m examples.run --from FOLDER` makes it again. The digest of an
output covers the result without its timings, and the weights or shards that are left: two executions that agree to the bit have
one digest, so a stage is stale only if what it was made from really changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.proof import revision
from examples.data.files import write_json
from examples.errors import UserError
from examples.train.checkpoint import list_checkpoints

FORMAT = "deepseek_ops stage 1"
SOURCES = ("examples", "deepseek_ops")  # what decides a stage's output
VOLATILE = re.compile(r"seconds|per_second|memory")  # keys of a result that no two executions share


def read_done(root: Path, stage: str) -> dict[str, Any] | None:
    """The record of a finished stage, or None; a record that cannot be read is an error, not "not finished"."""
    return _read(root / stage / "done.json", "delete it to rerun")


def read_begun(root: Path, stage: str) -> dict[str, Any] | None:
    """What a stage wrote when it began, or None: it has not, or an older version made it."""
    return _read(root / stage / "stage.json", "delete the stage's folder to rerun")


def _read(path: Path, way_out: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004
    except ValueError as error:
        raise UserError(f"{path}: must be JSON written by a stage; got {error}; {way_out}") from None
    return value


# --- what came out -------------------------------------------------------------------------------------------------


def without_timings(value: Any) -> Any:
    """A result without the values that differ from one execution to the next."""
    if isinstance(value, Mapping):
        return {key: without_timings(v) for key, v in value.items() if not VOLATILE.search(str(key))}
    return [without_timings(v) for v in value] if isinstance(value, (list, tuple)) else value


def output_digest(folder: Path, result: Mapping[str, Any]) -> str:
    """16 hex digits over the result, the newest checkpoint and every manifest of shards in `folder`."""
    digest = hashlib.sha256(json.dumps(without_timings(result), sort_keys=True).encode())
    manifests = [p / "manifest.json" for p in list_checkpoints(folder)[-1:]]
    manifests += sorted(p for p in folder.rglob("manifest.json") if "checkpoints" not in p.parts)
    for path in manifests:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def output_of(root: Path, stage: str) -> str | None:
    """Digest of a finished stage's output, None if it has not finished."""
    done = read_done(root, stage)
    if done is None:
        return None
    return done.get("output") or output_digest(root / stage, done["result"])  # an older version wrote none


# --- what made it --------------------------------------------------------------------------------------------------


@functools.cache
def _code() -> dict[str, Any]:
    return revision.current(sources=SOURCES).to_json()


def environment() -> dict[str, Any]:
    """What beside configuration and inputs decides the bits: code, torch, the processor's instructions, threads."""
    return {
        "code": _code(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def begin(root: Path, stage: str, about: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Write stage.json, or add this process to those that have worked on the stage."""
    record = read_begun(root, stage)
    now = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m examples.run", *sys.argv[1:]]),
        "environment": environment(),
    }
    if record is None:
        record = {
            "format": FORMAT,
            "stage": stage,
            "about": about,
            "reproduce": "python -m examples.run --from THIS_FOLDER --run-dir NEW_FOLDER",
            "inputs": dict(inputs),
            "seeds": seeds(config),
            "processes": [],
            "config": config,
        }
    record["processes"].append(now)
    write_json(root / stage / "stage.json", record)


def seeds(config: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """Every seed of a configuration by its dotted name."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= seeds(value, f"{prefix}{key}.")
        elif key == "seed":
            found[prefix + key] = value
    return found


def changed_input(root: Path, stage: str) -> str | None:
    """An input that is finished now with another output than `stage` was made from, or None."""
    record = read_begun(root, stage)
    for name, digest in (record or {"inputs": {}})["inputs"].items():
        if output_of(root, name) not in (None, digest):
            return str(name)
    return None


def remove(root: Path, stage: str) -> None:
    """Delete a stage's folder; killed in between, the stage counts as not finished."""
    forget(root, stage)
    if (root / stage).exists():
        shutil.rmtree(root / stage)


def forget(root: Path, stage: str) -> None:
    """The stage counts as not begun; its files stay."""
    for name in ("done.json", "stage.json"):
        (root / stage / name).unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any]:
    """stage.json of a folder that somebody wants to make again."""
    record = _read(folder / "stage.json", "take another folder")
    if record is None:
        raise UserError(f"--from: must be the folder of a stage, with a stage.json; got {folder}")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{folder / 'stage.json'}: format {record.get('format')!r}; this version reads {FORMAT!r}"
        )
    return record
