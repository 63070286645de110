"""A machine with a Hopper GPU that does not exist: steps answer from a script, time is a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.proof.device import Device, DeviceInfo, ProcessResult

INFO = DeviceInfo("NVIDIA H100 80GB HBM3", "580.159.04", 81559, "9.0")


@dataclass
class Script:
    """How one step behaves: how long it takes, its result file, its exit status, whether it never ends."""

    seconds: float = 10.0
    data: Any = field(default_factory=lambda: {"summary": "fine"})
    returncode: int = 0
    output: str = ""
    hangs: bool = False
    raw: str | None = None  # written instead of JSON
    action: Callable[[], None] | None = None


class FakeDevice(Device):
    """`scripts` by step name; a step without one takes ten seconds and is fine. `calls` lists (step, timeout)."""

    def __init__(self, scripts: dict[str, Script] | None = None, info: DeviceInfo | None = INFO) -> None:
        self.scripts, self._info = scripts or {}, info
        self.seconds = 0.0
        self.calls: list[tuple[str, float]] = []

    def info(self) -> DeviceInfo | None:
        return self._info

    def absent_reason(self) -> str | None:
        return None if self._info else "no NVIDIA driver (nvidia-smi is not on the PATH)"

    def clocks(self) -> dict[str, float]:
        return {"sm_mhz": 1755.0, "power_w": 412.5}

    def time(self) -> float:
        return self.seconds

    def now(self) -> str:
        return f"2026-11-24T10:{int(self.seconds) // 60:02}:{int(self.seconds) % 60:02}Z"

    def run_process(self, argv: list[str], timeout_s: float, cwd: Path | None = None) -> ProcessResult:
        step = argv[argv.index("bench.proof.worker") + 1]
        self.calls.append((step, timeout_s))
        script = self.scripts.get(step, Script(seconds=1.0 if step == "ping" else 10.0))
        if script.action is not None:
            script.action()
        if script.hangs or script.seconds > timeout_s:
            self.seconds += timeout_s
            return ProcessResult(-9, script.output, timeout_s, timed_out=True)
        self.seconds += script.seconds
        if "--result" in argv and script.returncode == 0:
            file = Path(argv[argv.index("--result") + 1])
            if script.raw is not None:
                file.write_text(script.raw)
            elif script.data is not None:
                file.write_text(json.dumps(script.data))
        return ProcessResult(script.returncode, script.output, script.seconds)

    def steps(self) -> list[str]:
        """Names of the steps that were started, pings left out."""
        return [step for step, _ in self.calls if step != "ping"]
