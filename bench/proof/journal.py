"""What has been done: one JSON line per event, appended and flushed, so that a kill loses at most one step.

Lines of all revisions and devices share a file; a run reads only those of its own key. A torn or foreign line is
ignored and counted, never an error: the journal saves time, the ledger keeps the truth.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Journal:
    """The events of one key ("<tree>/<device>") in `path`."""

    path: Path
    key: str
    ledger: str = ""  # file name of the ledger that the run with these events writes
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # by step: the result, latest wins
    tried: set[str] = field(default_factory=set)  # started, and not ended well: also when the run was killed
    unreadable: int = 0

    @classmethod
    def read(cls, path: Path, key: str) -> Journal:
        """Events of `key` so far; an absent file is an empty journal."""
        journal = cls(path, key)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for line in lines:
            if not line.strip():
                continue
            try:
                event = json.loads(line)
                if event["key"] == key:
                    journal._take(event)
            except (ValueError, KeyError, TypeError):
                journal.unreadable += 1
        return journal

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "opened":
            self.ledger = str(event["ledger"])
            self.finished, self.tried = {}, set()  # a new run, not a resumed one
        elif kind == "started":
            self.tried.add(str(event["step"]))
        elif kind == "finished":
            result = event["result"]
            name = result["name"]
            if result["status"] not in ("ok", "failed", "timeout"):
                raise ValueError(result["status"])
            self.finished[name] = result
            if result["status"] == "ok":
                self.tried.discard(name)

    def opened(self, ledger: str) -> None:
        """A run begins that does not continue an earlier one."""
        event = {"event": "opened", "ledger": ledger}
        self._take(event)
        self._append(event)

    def started(self, step: str) -> None:
        """A step begins."""
        event = {"event": "started", "step": step}
        self._take(event)
        self._append(event)

    def ended(self, result: dict[str, Any]) -> None:
        """A step has ended, well or not; `result` is its entry in the ledger."""
        event = {"event": "finished", "result": result}
        self._take(event)
        self._append(event)

    def _append(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")  # after a torn line
            file.write(json.dumps({"key": self.key, **event}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
