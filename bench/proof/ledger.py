"""The ledger: one JSON file per run on a device, versioned, validated on read, written atomically.

bench/ledger/README.md documents the fields; `validate` is the schema.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "failed", "timeout", "skipped")
KINDS = ("environment", "build", "probe", "tests", "benchmark")

_TOP: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "began": str,
    "ended": str,
    "budget_minutes": (int, float),
    "family": (str, type(None)),
    "revision": dict,
    "device": dict,
    "steps": list,
}
_REVISION: dict[str, type | tuple[type, ...]] = {"commit": str, "dirty": bool, "tree": str}
_DEVICE: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "driver": str,
    "memory_mib": int,
    "capability": str,
}
_STEP: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "kind": str,
    "family": str,
    "status": str,
    "reason": str,
    "began": str,
    "seconds": (int, float),
    "clocks": list,
    "data": dict,
    "log": str,
}


class LedgerError(ValueError):
    """A file that is no ledger; the message names the file, the field and what is wrong."""


def _check(value: Any, fields: dict[str, type | tuple[type, ...]], where: str) -> None:
    if not isinstance(value, dict):
        raise LedgerError(f"{where}: must be an object, is {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise LedgerError(f"{where}.{name}: is missing")
        if not isinstance(value[name], kind) or (isinstance(value[name], bool) and kind is not bool):
            raise LedgerError(f"{where}.{name}: has the type {type(value[name]).__name__}")
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise LedgerError(f"{where}.{unknown[0]}: is not a field of schema {SCHEMA}")


def validate(value: Any, where: str = "ledger") -> dict[str, Any]:
    """`value` if it is a ledger of this schema; LedgerError otherwise."""
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise LedgerError(f"{where}.schema: must be {SCHEMA}, is {value.get('schema')!r}")
    _check(value, _TOP, where)
    _check(value["revision"], _REVISION, f"{where}.revision")
    _check(value["device"], _DEVICE, f"{where}.device")
    names = set()
    for i, step in enumerate(value["steps"]):
        at = f"{where}.steps[{i}]"
        _check(step, _STEP, at)
        if step["status"] not in STATUSES:
            raise LedgerError(f"{at}.status: must be one of {', '.join(STATUSES)}, is {step['status']!r}")
        if step["kind"] not in KINDS:
            raise LedgerError(f"{at}.kind: must be one of {', '.join(KINDS)}, is {step['kind']!r}")
        if step["name"] in names:
            raise LedgerError(f"{at}.name: {step['name']!r} appears twice")
        names.add(step["name"])
    result: dict[str, Any] = value
    return result


def read(path: Path) -> dict[str, Any]:
    """A validated ledger; LedgerError names the file when it is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise LedgerError(f"{path.name}: not readable as JSON ({error})") from None
    return validate(value, path.name)


def read_all(folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Every ledger of a folder as (file name, content), oldest first, and a sentence per file that is none."""
    good, bad = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            good.append((path.name, read(path)))
        except LedgerError as error:
            bad.append(str(error))
    good.sort(key=lambda entry: (entry[1]["began"], entry[0]))
    return good, bad


def write(path: Path, value: dict[str, Any]) -> None:
    """Validate, then replace the file in one step: a reader never sees half a ledger."""
    validate(value, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def free_name(folder: Path, stem: str) -> str:
    """`<stem>.json`, or `<stem>-2.json` and so on when that exists."""
    name, count = f"{stem}.json", 1
    while (folder / name).exists():
        count += 1
        name = f"{stem}-{count}.json"
    return name
