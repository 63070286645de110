"""The tests marked `gpu`: run by pytest in one process, their outcomes by name."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from .revision import ROOT
from .steps import Data


def files() -> list[Path]:
    """Files with such tests."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def run() -> Data:
    """pytest -m gpu; outcomes by test."""
    found = files()
    if not found:
        return {"outcomes": {}, "verdict": "equal", "summary": "no test is marked gpu"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            f"--junitxml={file}",
            *map(str, found),
        ]
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        print(done.stdout[-8000:])
        if done.returncode not in (0, 1, 5) or not file.exists():
            raise SystemExit(f"pytest ended with {done.returncode}")
        outcomes = read_junit(file)
    counts = {state: list(outcomes.values()).count(state) for state in ("passed", "failed", "skipped")}
    return {
        "outcomes": outcomes,
        "verdict": "differs" if counts["failed"] else "equal",
        "tail": done.stdout[-4000:] if counts["failed"] else "",
        "summary": ", ".join(f"{count} {state}" for state, count in counts.items() if count),
    }


def read_junit(file: Path) -> dict[str, str]:
    """{"module::name": "passed" | "failed" | "skipped"} of a junit file that our own pytest has just written."""
    outcomes = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        bad = case.find("failure") is not None or case.find("error") is not None
        outcomes[name] = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
    return outcomes
