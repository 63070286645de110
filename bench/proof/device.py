"""The machine, as thin as possible: everything else in this package is logic and is tested with a fake of this.

Whatever touches the GPU runs in a process of its own with a deadline: a hang is killed, a CUDA error that poisons
its context ends with its process, and the next step starts clean.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRACE_S = 5.0  # between SIGTERM and SIGKILL

_QUERY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "max_sm_mhz": "clocks.max.sm",
}


@dataclass(frozen=True)
class DeviceInfo:
    """Which GPU this is."""

    name: str
    driver: str
    memory_mib: int
    capability: str  # "9.0"

    @property
    def slug(self) -> str:
        """The name for file names: `nvidia-h100-80gb-hbm3`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ProcessResult:
    """How a process ended. `output` is stdout and stderr together; a killed one has `timed_out` set."""

    returncode: int
    output: str
    seconds: float
    timed_out: bool = False


class Device:
    """This machine. Methods answer; none of them raises because a tool or a GPU is missing."""

    def info(self) -> DeviceInfo | None:
        """The first GPU, or None; `absent_reason` says why."""
        row = self._smi("name", "driver_version", "memory.total", "compute_cap")
        if row is None:
            return None
        name, driver, memory, capability = row
        return DeviceInfo(name, driver, int(float(memory)), capability)

    def absent_reason(self) -> str | None:
        """Why nothing can be proven here; None on a Hopper GPU."""
        if shutil.which("nvidia-smi") is None:
            return "no NVIDIA driver (nvidia-smi is not on the PATH)"
        info = self.info()
        if info is None:
            return "nvidia-smi lists no GPU"
        if info.capability != "9.0":
            return f"{info.name} has compute capability {info.capability}; the kernels are for 9.0 (sm_90a)"
        return None

    def cuda_available(self) -> bool:
        """Whether this is a machine to prove anything on."""
        return self.absent_reason() is None

    def clocks(self) -> dict[str, float]:
        """SM and memory clocks, power, temperature now; empty when nvidia-smi does not answer."""
        row = self._smi(*_QUERY.values())
        if row is None:
            return {}
        result = {}
        for key, text in zip(_QUERY, row, strict=True):
            with contextlib.suppress(ValueError):  # "[N/A]"
                result[key] = float(text)
        return result

    def run_process(self, argv: list[str], timeout_s: float, cwd: Path | None = None) -> ProcessResult:
        """Run to the end or to the deadline; then the process and all its children are killed."""
        began = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # not a new session: whatever ends ours must end it, too
        )
        timed_out = False
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            output = self._kill(process)
        except BaseException:  # Ctrl-C: no orphan may hold the GPU
            self._kill(process)
            raise
        return ProcessResult(process.returncode, output, time.monotonic() - began, timed_out)

    def python(self) -> str:
        """The interpreter for the steps' processes."""
        return sys.executable

    def time(self) -> float:
        """Seconds for budgets; only differences mean something."""
        return time.monotonic()

    def now(self) -> str:
        """UTC time, ISO 8601 to the second."""
        return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @staticmethod
    def _kill(process: subprocess.Popen[str]) -> str:
        output = ""
        for what in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, what)
            try:
                output, _ = process.communicate(timeout=GRACE_S)
                break
            except subprocess.TimeoutExpired:
                continue  # a process stuck in the driver may outlive even SIGKILL for a while: go on without it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that ignored SIGTERM
        return output or ""

    @staticmethod
    def _smi(*fields: str) -> list[str] | None:
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0 or not done.stdout.strip():
            return None
        row = [field.strip() for field in done.stdout.strip().splitlines()[0].split(",")]
        return row if len(row) == len(fields) else None
