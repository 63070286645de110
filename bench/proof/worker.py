"""What runs inside the process of one step: `python -m bench.proof.worker STEP --result FILE`.

Only `bench.prove` calls this. The result is one JSON object; `summary` in it is shown in the table, `verdict`
("equal" or "differs") decides whether the step counts as a disagreement.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import sys
from pathlib import Path

from .families import all_steps
from .revision import ROOT
from .steps import Data


def work(name: str, golden: Path) -> Data:
    """The data of one step; raises when it cannot be done."""
    if name == "ping":  # no step of a plan: asked after a failure
        from .machine import ping

        return ping()
    step = next((step for step in all_steps() if step.name == name), None)
    if step is None:
        raise SystemExit(f"no such step: {name!r}")
    return step.run(golden)


def _die_with_parent() -> None:
    """When bench.prove is killed outright, nothing may go on holding the GPU (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    """Do one step and write its result."""
    parser = argparse.ArgumentParser(prog="python -m bench.proof.worker")
    parser.add_argument("step")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--seconds", type=int, default=600, help="when this process will be killed")
    options = parser.parse_args(arguments)
    _die_with_parent()
    data = work(options.step, options.golden)
    if options.result:
        options.result.write_text(json.dumps(data))


if __name__ == "__main__":
    main()
