"""Run a program that a model wrote, which may do anything, and learn how it ended.

    result = Sandbox().run("print(6 * 7)")          # Result(status="ok", stdout="42\\n", ...)
    python -m examples.rewards.sandbox program.py   # the same from a shell; without a file: what protects this machine

What stands between the program and the machine, strongest first; `Sandbox().protection` says which is active and why not
a stronger one:

    namespaces  own PID, network, IPC, UTS and mount namespace (and user namespace, unless we are root): the program sees the
                interpreter, the system's libraries and one empty folder in memory, no network and no process but its own
    landlock    the machine's file system with the kernel's file rules: it reads the interpreter and the libraries, and
                writes to one empty folder; no sockets; signals to itself only
    limits      only the limits below, and the filter of system calls where there is one. Never chosen unasked.

In all of them: a process group and session of its own, limits of time, memory, output, file size, open files and processes,
no capability, no set-user-id, a filter of system calls (x86_64, aarch64), an environment without anything of ours,
an input at its end, and every descendant killed at the end. Started by root, the program runs as a user id that nobody has.
Only the standard library is there. Linux 5.12 (namespaces) or 6.2 (landlock).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from examples.errors import UserError
from examples.rewards.jail import LEVELS, remove_folder

Status = Literal["ok", "error", "timeout", "memory", "killed", "output"]
PROGRAM_BYTES = 1 << 20
_GRACE_SECONDS = 30.0  # past its limit: for a busy machine to notice; then the supervisor itself is killed
_ROOT = Path(__file__).resolve().parents[2]
_BOOT = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from examples.rewards.jail import main; main()"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Limits:
    """wall_seconds, cpu_seconds: of the whole run, all its processes together; where a verdict must not depend on how busy
    the machine is, wall_seconds is several times cpu_seconds. memory_mib: address space of each process,
    and memory of all together. output_kib: of each of the two streams. file_mib: one file; folder_mib: the folder
    (with namespaces). open_files: of each process. processes: threads count too."""

    wall_seconds: float = 15.0
    cpu_seconds: float = 5.0
    memory_mib: int = 512
    output_kib: int = 64
    file_mib: int = 16
    folder_mib: int = 64
    open_files: int = 64
    processes: int = 16

    def __post_init__(self) -> None:
        least = {"memory_mib": 64, "open_files": 16}
        for field in fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 0)
            if not value > 0 or value < low:
                rule = f"at least {low}" if low else "positive"
                raise UserError(f"limits.{field.name}: must be {rule}; got {value}")


@dataclass(frozen=True)
class Result:
    """How a program ended.

    status: ok (exit code 0), error (another exit code, or a signal of its own doing), timeout, memory, killed (by a signal
    from elsewhere, or by a caller that stopped), output (it wrote more than the limit). stdout, stderr: up to the limit.
    exit_code: as in subprocess, negative for a signal; None if it was ended. detail: why, in one line.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    exit_code: int | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.status == "ok"


@dataclass(frozen=True)
class Protection:
    """The level that is active, and why each stronger one is not."""

    level: str
    missing: dict[str, str]

    def __str__(self) -> str:
        return "; ".join([self.level, *(f"not {level}: {why}" for level, why in self.missing.items())])


class Sandbox:
    """Runs programs, each on its own; safe to use from several threads.

    level: "namespaces", "landlock" or "limits"; None: the stronger of the first two that works here, `UserError` if neither.
    python: interpreter of the programs, default the one that runs us. Root needs one that others can read unless there are
    namespaces.
    """

    def __init__(
        self, limits: Limits | None = None, *, level: str | None = None, python: str | None = None
    ) -> None:
        if level is not None and level not in LEVELS:
            raise UserError(f"sandbox level: must be one of {', '.join(LEVELS)}; got {level!r}")
        self.limits = limits or Limits()
        self._python, self._readable = _interpreter(python)
        self.protection = _protection(level, self._python, self._readable)
        self._beside = (
            True  # False: without Landlock and the filter beside namespaces, to see that these hold alone
        )

    def run(self, program: str) -> Result:
        """Run Python source as `__main__` in an empty folder and wait for its end."""
        size = len(program.encode(errors="replace"))
        if size > PROGRAM_BYTES:
            return Result("error", detail=f"the program has {size} bytes; at most {PROGRAM_BYTES} are run")
        result, problem = _run(
            program, self.limits, self.protection.level, self._python, self._readable, self._beside
        )
        if problem:
            raise UserError(f"sandbox ({self.protection.level}): could not be set up: {problem}")
        return result

    def run_many(self, programs: Iterable[str], workers: int | None = None) -> list[Result]:
        """`run` for each, `workers` at once (default: processors)."""
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            return list(pool.map(self.run, programs))


@functools.lru_cache
def _interpreter(python: str | None) -> tuple[str, tuple[str, ...]]:
    """Path of the interpreter behind any virtual environment, and what it must be able to read."""
    if python is None:
        found, prefix = getattr(sys, "_base_executable", sys.executable), sys.base_prefix
    else:
        try:
            question = "import sys; print(sys._base_executable, sys.base_prefix, sep='\\n')"
            output = subprocess.run([python, "-I", "-S", "-c", question], capture_output=True, check=True)
            found, prefix = output.stdout.decode().splitlines()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise UserError(
                f"sandbox python: must be a Python 3.11 or newer; got {python!r} ({error})"
            ) from None
    found = os.path.realpath(found)
    wanted = [found, f"{prefix}/lib", f"{prefix}/lib64", *_LIBRARIES]
    return found, tuple(path for path in dict.fromkeys(wanted) if os.path.lexists(path))


@functools.lru_cache
def _protection(level: str | None, python: str, readable: tuple[str, ...]) -> Protection:
    """Try the levels with an empty program."""
    missing: dict[str, str] = {}
    if sys.platform != "linux":
        raise UserError(f"sandbox: needs Linux; got {sys.platform}")
    for candidate in LEVELS[:2] if level is None else (level,):
        result, problem = _run("pass", Limits(wall_seconds=60), candidate, python, readable)
        if problem is None and result.ok:
            return Protection(candidate, missing)
        missing[candidate] = problem or f"{result.status}: {result.detail or result.stderr.strip()[-200:]}"
    reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
    advice = "" if level == "limits" else "; level='limits' runs programs with limits only"
    raise UserError(f"sandbox: no protection works here ({reasons}){advice}")


def _run(
    program: str, limits: Limits, level: str, python: str, readable: Sequence[str], beside: bool = True
) -> tuple[Result, str | None]:
    """Start a supervisor, read what the program writes, and learn the outcome; or what could not be set up."""
    base = tempfile.mkdtemp(prefix="sandbox-")
    task = {
        "program": program,
        "base": base,
        "limits": asdict(limits),
        "level": level,
        "python": python,
        "readable": readable,
        "beside": beside,
    }
    status_read, status_write = os.pipe()
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOT, str(status_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status_write,),
            start_new_session=True,
            env={},
            cwd="/",
            bufsize=0,
        )
        os.close(status_write)
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task).encode() + b"\n")  # type: ignore[union-attr]
            streams, full = _read(process, status_read, limits)
        finally:
            _end(process)
    finally:
        os.close(status_read)
        remove_folder(base)
    return _outcome(streams, full, time.monotonic() - start, limits)


def _read(process: subprocess.Popen, status: int, limits: Limits) -> tuple[dict[str, bytes], bool]:
    """What was written to stdout, stderr and the status pipe; and whether it was too much."""
    deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
    collected = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
    limit, full = limits.output_kib << 10, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")  # type: ignore[arg-type]
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")  # type: ignore[arg-type]
        selector.register(status, selectors.EVENT_READ, "status")
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(0.5):
                data = os.read(key.fd, 1 << 16)
                kept = collected[key.data]
                room = limit - len(kept) if key.data != "status" else len(data)
                kept += data[:room]
                if key.data == "status" and (not data or kept.endswith(b"\n")):
                    deadline = min(
                        deadline, time.monotonic() + 1.0
                    )  # all have ended: nothing more can be written
                if not data:
                    selector.unregister(key.fileobj)
                elif len(data) > room and not full:
                    full = True
                    process.stdin.close()  # type: ignore[union-attr]  # the supervisor ends everything
    return {name: bytes(value) for name, value in collected.items()}, full


def _end(process: subprocess.Popen) -> None:
    """Let the supervisor kill everything; if it does not, kill it (with namespaces, init dies with it)."""
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()  # type: ignore[union-attr]
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _outcome(
    streams: dict[str, bytes], full: bool, seconds: float, limits: Limits
) -> tuple[Result, str | None]:
    stdout, stderr = (streams[name].decode(errors="replace") for name in ("stdout", "stderr"))
    if not streams["status"]:
        return Result("killed", stdout, stderr, seconds, detail="its supervisor ended without a word"), None
    outcome = json.loads(streams["status"])
    if "setup" in outcome:
        return Result("killed"), outcome["setup"]
    code, cpu = outcome.get("exit"), outcome["cpu_seconds"]
    status, detail = _judge(outcome["reason"], code, cpu, full, stderr, limits)
    exit_code = None if outcome["reason"] else code
    return Result(status, stdout, stderr, outcome["seconds"], cpu, exit_code, detail), None


def _judge(
    reason: str | None, code: int | None, cpu: float, full: bool, stderr: str, limits: Limits
) -> tuple[Status, str]:
    """Status and detail, from why it was ended (`reason`) or how it ended by itself (`code`)."""
    if full:
        return "output", f"wrote more than {limits.output_kib} KiB"
    if reason == "wall":
        return "timeout", f"ran longer than {limits.wall_seconds:g} s"
    if reason == "cpu" or code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limits.cpu_seconds):
        return "timeout", f"used more than {limits.cpu_seconds:g} s of processor time"
    if reason == "memory":
        return "memory", f"its processes held more than {limits.memory_mib} MiB"
    if reason is not None or code is None:
        return "killed", "stopped by the caller" if reason else "ended without an exit code"
    if code == 0:
        return "ok", ""
    last = stderr.rstrip().rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return "memory", f"asked for more than {limits.memory_mib} MiB"
    if code == -signal.SIGKILL:
        return "killed", "by SIGKILL"
    return "error", last if code > 0 else f"by {signal.Signals(-code).name}"


def main() -> None:
    """Run a file, or say what protects this machine."""
    try:
        sandbox = Sandbox()
        if len(sys.argv) < 2:
            print(sandbox.protection)
            return
        result = sandbox.run(Path(sys.argv[1]).read_text(encoding="utf-8"))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(result.stdout, end="")
    print(result.stderr, end="", file=sys.stderr)
    print(f"{result.status} in {result.seconds:.2f} s {result.detail}", file=sys.stderr)


if __name__ == "__main__":
    main()
