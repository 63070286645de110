"""Runs a plan: every step in a process with a deadline, its result to the journal and the ledger at once."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ledger as ledgers
from .device import Device, DeviceInfo
from .journal import Journal
from .plan import Budget, order
from .revision import ROOT, Revision
from .steps import Step

LOG_CHARACTERS = 4000  # of a step's output kept in the ledger
PING_S = 60.0


@dataclass(frozen=True)
class Places:
    """Where results go. The folder mirrors the repository, so that `cp -r OUT/. .` brings a lent machine's home."""

    out: Path

    @property
    def ledger(self) -> Path:
        """Ledger files."""
        return self.out / "bench" / "ledger"

    @property
    def golden(self) -> Path:
        """Golden vectors."""
        return self.out / "tests" / "golden"

    @property
    def journal(self) -> Path:
        """The resume file; git ignores it."""
        return self.out / "build" / "prove" / "journal.jsonl"

    @property
    def page(self) -> Path:
        """The generated page."""
        return self.out / "docs" / "hardware.md"


class Run:
    """One call of prove on a device."""

    def __init__(
        self,
        device: Device,
        info: DeviceInfo,
        revision: Revision,
        places: Places,
        minutes: float,
        family: str | None = None,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.device, self.places, self.say = device, places, say
        self.budget = Budget(device.time, minutes * 60)
        self.journal = Journal.read(places.journal, f"{revision.tree}/{info.slug}")
        if self.journal.unreadable:
            say(f"journal: {self.journal.unreadable} unreadable line(s) ignored")
        began = device.now()
        earlier = self._earlier(revision) if resume else None
        if earlier is None:
            if resume:
                say("nothing to resume for this source and device: starting from the beginning")
            stem = f"{began[:10]}-{info.slug}-{revision.slug}"
            self.journal.opened(ledgers.free_name(places.ledger, stem))
        self.path = places.ledger / self.journal.ledger
        self.ledger: dict[str, Any] = {
            "schema": ledgers.SCHEMA,
            "began": earlier["began"] if earlier else began,
            "ended": began,
            "budget_minutes": minutes,
            "family": family,
            "revision": revision.to_json(),
            "device": info.to_json(),
            "steps": [],
        }
        self.results: dict[str, dict[str, Any]] = {}
        if earlier is not None:  # the journal knows steps that the ledger lost when the run was killed
            known = {step["name"]: step for step in earlier["steps"] if step["status"] != "skipped"}
            self.results = {**known, **self.journal.finished}

    def _earlier(self, revision: Revision) -> dict[str, Any] | None:
        """The ledger to go on with; a stand-in when only the journal survived (a lent machine is bare)."""
        if not self.journal.ledger:
            return None
        try:
            earlier = ledgers.read(self.places.ledger / self.journal.ledger)
        except ledgers.LedgerError as error:
            if (self.places.ledger / self.journal.ledger).exists():
                self.say(f"ledger ignored, the journal has its steps: {error}")
            began = [result["began"] for result in self.journal.finished.values()]
            return {"began": min(began, default=self.device.now()), "steps": []}
        return earlier if earlier["revision"]["tree"] == revision.tree else None

    def go(self, steps: list[Step]) -> dict[str, Any]:
        """Run what fits; returns the ledger, which has also been written."""
        done = {name for name, result in self.results.items() if result["status"] == "ok"}
        todo = [step for step in steps if step.name not in done]
        if done:
            self.say(f"resumed: {len(done)} step(s) were done before")
        alive = True
        for step in order(todo, self.journal.tried):
            if not alive:
                self._skip(step, "the device stopped answering")
                continue
            missing = [n for n in step.needs if self.results.get(n, {}).get("status") != "ok"]
            reason = f"needs {missing[0]}, which did not end well" if missing else self.budget.refusal(step)
            if reason:
                self._skip(step, reason)
                continue
            alive = self._run(step)
        self._write(steps)
        return self.ledger

    def _skip(self, step: Step, reason: str) -> None:
        earlier = self.results.get(step.name)
        if earlier is None or earlier["status"] == "skipped":  # keep what an earlier try showed
            self.results[step.name] = self._result(step, "skipped", reason)
        self.say(f"skip  {step.name}: {reason}")

    def _run(self, step: Step) -> bool:
        """False when the device does not answer any more."""
        self.journal.started(step.name)
        began = self.device.now()
        deadline = self.budget.deadline(step)
        clocks = [self.device.clocks()]
        with tempfile.TemporaryDirectory(prefix="prove-") as folder:
            file = Path(folder) / "result.json"
            argv = [
                self.device.python(), "-m", "bench.proof.worker", step.name,
                "--result", str(file), "--golden", str(self.places.golden),
                "--seconds", str(int(deadline)),
            ]  # fmt: skip
            process = self.device.run_process(argv, deadline, cwd=ROOT)
            data, problem = _read_result(file)
        clocks.append(self.device.clocks())
        if process.timed_out:
            status, reason = "timeout", f"killed at its deadline of {deadline:.0f} s"
        elif process.returncode != 0:
            status, reason = "failed", f"exit status {process.returncode}: {_last_line(process.output)}"
        elif problem:
            status, reason = "failed", problem
        else:
            status, reason = "ok", ""
        result = self._result(step, status, reason)
        result.update(
            began=began,
            seconds=round(process.seconds, 2),
            clocks=clocks,
            data=data,
            log="" if status == "ok" else process.output[-LOG_CHARACTERS:],
        )
        self.results[step.name] = result
        self.journal.ended(result)
        self._write()
        self.say(
            f"{status:5} {step.name} ({process.seconds:.1f} s){': ' + reason if reason else ''}{summary(result)}"
        )
        return status == "ok" or step.kind in ("environment", "build") or self._answers()

    def _answers(self) -> bool:
        """After a failure: can a new process still use the GPU?"""
        argv = [self.device.python(), "-m", "bench.proof.worker", "ping"]
        process = self.device.run_process(argv, min(PING_S, max(5.0, self.budget.left())), cwd=ROOT)
        if process.returncode == 0 and not process.timed_out:
            return True
        self.say(f"the device does not answer any more: {_last_line(process.output) or 'ping timed out'}")
        return False

    def _result(self, step: Step, status: str, reason: str) -> dict[str, Any]:
        return {
            "name": step.name, "kind": step.kind, "family": step.family, "status": status, "reason": reason,
            "began": self.device.now(), "seconds": 0.0, "clocks": [], "data": {}, "log": "",
        }  # fmt: skip

    def _write(self, steps: list[Step] | None = None) -> None:
        if steps is not None:  # in the order of the plan
            place = {step.name: i for i, step in enumerate(steps)}
            names = sorted(self.results, key=lambda name: place.get(name, len(place)))
            self.results = {name: self.results[name] for name in names}
        self.ledger["steps"] = list(self.results.values())
        self.ledger["ended"] = self.device.now()
        ledgers.write(self.path, self.ledger)


def _read_result(file: Path) -> tuple[dict[str, Any], str]:
    """What the worker wrote, and what is wrong with it."""
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return {}, f"the step wrote no result ({error.__class__.__name__})"
    if not isinstance(data, dict):
        return {}, "the step's result is no object"
    return _finite(data), ""


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def summary(result: dict[str, Any]) -> str:
    """What the step showed, for the table: worker results carry it under `summary`."""
    text = result["data"].get("summary", "")
    return f"  {text}" if text else ""


def outcome(result: dict[str, Any]) -> str:
    """One word: skipped, timeout, failed, differs (a probe or a test disagrees) or ok."""
    if result["status"] == "ok" and result["data"].get("verdict") == "differs":
        return "differs"
    return str(result["status"])
