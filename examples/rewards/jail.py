"""The inside of the sandbox: three processes between the caller and a program that is not trusted.

    caller      examples.rewards.sandbox; any process with any number of threads
    supervisor  a fresh interpreter in its own session: watches time, memory and the caller; kills everything at the end
    init        builds what the program will see, waits for it, reaps what it leaves; process 1 of its PID namespace
    program     unprivileged, limited, filtered, then replaced by a fresh interpreter that runs the file

The caller holds one end of the supervisor's standard input: when it closes, be it because the caller has died, all is
killed. With namespaces the kernel kills whatever is left when init ends; without, the supervisor adopts all orphans
(PR_SET_CHILD_SUBREAPER) and kills its descendants until none is left. A fresh interpreter, and not a fork of the
caller, because a fork of a process with threads (torch) may hang, and would carry its memory to the program.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from examples.rewards import kernel, seccomp

LEVELS = ("namespaces", "landlock", "limits")
_TICK_MS = 25  # how often time and memory are looked at
_CLEANUP_SECONDS = 10.0
_DEVICES = ("null", "zero", "random", "urandom")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
# -S keeps installed packages away, and with them the project; `exit` and `quit` are what scripts expect.
_BOOT = (
    "import site; site.setquit(); del site; "
    "exec(compile(open({0!r}, encoding='utf-8').read(), {0!r}, 'exec'))"
)
# Nothing of the caller's environment; a fixed hash seed, for the order of a set must not decide a reward.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


def main() -> None:
    """The supervisor: reads its task, one line of JSON, from standard input; writes the outcome to the given pipe."""
    status = int(sys.argv[1])
    task = json.loads(sys.stdin.buffer.readline())
    try:
        outcome = _supervise(task)
    except OSError as error:
        outcome = {"setup": str(error)}
    os.write(status, json.dumps(outcome).encode() + b"\n")


# --- supervisor --------------------------------------------------------------------------------------------------


def _supervise(task: dict[str, Any]) -> dict[str, Any]:
    limits = task["limits"]
    task["uid"] = _spare_uid() if os.geteuid() == 0 else None
    kernel.adopt_orphans()
    task["processes"] = limits["processes"] + _counted_beside(task)
    if task["level"] == "namespaces":
        _leave_namespaces()
    kernel.hide_memory()
    report_read, report_write = os.pipe()
    start = time.monotonic()
    init = os.fork()
    if init == 0:
        _init(task, report_write)
    os.close(report_write)
    try:
        reason, seen = _watch(init, start, limits)
    finally:
        _kill_all(init, task["level"])
    if reason == "stopped":  # by a caller who may be there no longer
        remove_folder(task["base"])
    seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # without those that the kernel has ended with init
    outcome = {"seconds": seconds, "cpu_seconds": max(seen, used.ru_utime + used.ru_stime), "reason": reason}
    report = os.read(report_read, 4096).decode(errors="replace")
    kind, _, value = report.partition("\n")[0].partition(" ")
    if kind == "setup":
        return {"setup": value}
    return outcome | ({"exit": int(value)} if kind == "exit" else {})


def _watch(init: int, start: float, limits: dict[str, Any]) -> tuple[str | None, float]:
    """Wait until init has ended (None), or there is a reason to end it; and the processor time seen so far."""
    poller = select.poll()
    ended = os.pidfd_open(init)
    poller.register(ended, select.POLLIN)
    poller.register(0, select.POLLIN)  # readable only when the caller has closed it
    cpu = 0.0
    while True:
        ready = {fd for fd, _ in poller.poll(_TICK_MS)}
        if ended in ready:
            return None, cpu
        if 0 in ready:
            return "stopped", cpu
        _reap()
        now, memory = _usage(init)
        cpu = max(cpu, now)
        if time.monotonic() - start > limits["wall_seconds"]:
            return "wall", cpu
        if cpu > limits["cpu_seconds"]:
            return "cpu", cpu
        if memory > limits["memory_mib"] << 20:
            return "memory", cpu


def _children(pid: int) -> Iterator[int]:
    """Children of a process, whichever of its threads made them."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return


def _descendants() -> list[int]:
    """Every process below the supervisor: fathers before sons."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        born = list(_children(waiting.pop()))
        found += born
        waiting += born
    return found


def _usage(init: int) -> tuple[float, int]:
    """Processor seconds of all descendants, ended ones that were waited for included, and bytes in memory of the living."""
    ticks = pages = 0
    for pid in _descendants():
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += sum(map(int, fields[11:15]))  # user, system, and both of children that have ended
        pages += int(fields[21]) if pid != init else 0
    return ticks / _TICKS, pages * _PAGE


def _reap() -> bool:
    """Take note of ended children; whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _kill_all(init: int, level: str) -> None:
    """No descendant is left when this returns."""
    deadline = time.monotonic() + _CLEANUP_SECONDS
    while _reap():
        if time.monotonic() > deadline:
            raise OSError("processes of the program could not be killed")
        # With namespaces the end of init is the end of all; else stop them all first, so that none has another child.
        targets = [init] if level == "namespaces" else _descendants()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in targets:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        time.sleep(0.001)


def remove_folder(base: str) -> None:
    """Delete the folder. Not by shutil: the program may have nested it deeper than Python recurses, and changed modes."""
    try:
        os.rmdir(base)  # with namespaces there is nothing in it
    except FileNotFoundError:
        return
    except OSError:
        for command in (["/bin/chmod", "-R", "u+rwx", base], ["/bin/rm", "-rf", base]):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _spare_uid() -> int:
    """A user id that nobody has: root's programs run as it, and its processes can be counted."""
    first, _, length = map(int, Path("/proc/self/uid_map").read_text().splitlines()[0].split())
    span = 1 << 22 if length > 1 << 24 else 4096
    if length < 2 * span:
        raise OSError("setresuid: there is no spare user id in this user namespace")
    return min(first + length, 2_000_000_000) - 2 - os.getpid() % span


def _counted_beside(task: dict[str, Any]) -> int:
    """Processes that RLIMIT_NPROC will count with those of the program."""
    if task["uid"] is not None:
        return 0
    release = tuple(map(int, platform.release().split("-")[0].split(".")[:2]))
    if task["level"] == "namespaces" and release >= (5, 14):  # counted in the user namespace
        return 2
    mine, count = os.getuid(), 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == mine:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return count


def _leave_namespaces() -> None:
    """New PID (for the next child), network, IPC and UTS namespaces; an ordinary user needs a user namespace for it."""
    uid, gid = os.geteuid(), os.getegid()
    apart = kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    if uid == 0:
        kernel.unshare(apart)
        return
    kernel.unshare(apart | kernel.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


# --- init --------------------------------------------------------------------------------------------------------


def _init(task: dict[str, Any], report: int) -> NoReturn:
    """Build the program's world, start it, reap until it ends, report how."""
    try:
        if task["level"] == "namespaces":
            kernel.die_with_parent(signal.SIGKILL)
        base = Path(task["base"])
        root = _build_root(base, task) if task["level"] == "namespaces" else _build_folder(base, task)
        program = os.fork()
        if program == 0:
            _program(root, task, report)
        while True:
            pid, status = os.wait()
            if pid == program:
                break
        os.write(report, f"exit {os.waitstatus_to_exitcode(status)}".encode())
    except BaseException as error:  # noqa: BLE001 - a fork never goes back to its parent's code
        os.write(report, f"setup {error}\n".encode())
    os._exit(0)


def _build_root(base: Path, task: dict[str, Any]) -> Path:
    """A root file system of memory: the interpreter and the system's libraries read-only, the program, an empty folder."""
    uid = os.getuid() if task["uid"] is None else task["uid"]
    gid = os.getgid() if task["uid"] is None else task["uid"]
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", Path("/"), None, kernel.MS_REC | kernel.MS_PRIVATE)
    guard = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("sandbox", base, "tmpfs", kernel.MS_NOSUID, "size=2m,nr_inodes=4096,mode=755")
    for source in map(Path, task["readable"]):
        target = base / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():  # /lib -> usr/lib
            if not target.exists():
                target.symlink_to(os.readlink(source))
            continue
        target.mkdir() if source.is_dir() else target.touch()
        kernel.bind_read_only(source, target)
    (base / "dev").mkdir()
    for name in _DEVICES:
        (base / "dev" / name).touch()
        kernel.bind_read_only(Path("/dev", name), base / "dev" / name, device=True)
    (base / "program.py").write_text(task["program"], encoding="utf-8", errors="replace")
    work = base / "work"
    work.mkdir()
    size = f"size={task['limits']['folder_mib']}m,nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    kernel.mount("work", work, "tmpfs", guard, size)
    kernel.mount("none", base, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)
    kernel.change_root(base)
    return Path("/")


def _build_folder(base: Path, task: dict[str, Any]) -> Path:
    """The program and its folder where the caller made room, for a program that will see the machine's file system."""
    (base / "program.py").write_text(task["program"], encoding="utf-8", errors="replace")
    work = base / "work"
    work.mkdir(mode=0o700)
    base.chmod(0o755)
    if task["uid"] is not None:
        os.chown(work, task["uid"], task["uid"])
    return base


# --- program -----------------------------------------------------------------------------------------------------


def _program(root: Path, task: dict[str, Any], report: int) -> NoReturn:
    """Give everything up, then become the interpreter that runs the program."""
    try:
        os.setsid()
        os.umask(0o022)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.closerange(3, report)
        os.closerange(report + 1, 1 << 16)
        file, work = root / "program.py", root / "work"
        _limit(task["limits"], task["processes"])
        kernel.drop_privileges(task["uid"])
        os.chdir(work)
        shared = task["level"] != "namespaces"
        if task["level"] == "landlock" or (not shared and task["beside"]):
            _restrict(task, file, work)
        if seccomp.supported() and task["beside"]:
            kernel.install_filter(seccomp.build_filter(platform.machine(), os.getpid(), shared=shared))
        python = task["python"]
        arguments = [python, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _BOOT.format(str(file))]
        os.execve(python, arguments, _ENVIRONMENT)
    except BaseException as error:  # noqa: BLE001 - a fork never goes back to its parent's code
        os.write(report, f"setup {error}\n".encode())
    os._exit(1)


def _restrict(task: dict[str, Any], file: Path, work: Path) -> None:
    """Landlock, beside namespaces where the kernel has it, instead of them where it must."""
    if kernel.landlock_version() < kernel.NEEDED_LANDLOCK:
        if task["level"] == "landlock":
            raise OSError(f"landlock: this kernel has version {kernel.landlock_version()}")
        return
    if task["level"] == "landlock" and not seccomp.supported():
        raise OSError(f"landlock: needs a system call filter, which is unknown on {platform.machine()}")
    readable = [Path(path) for path in task["readable"] if os.path.exists(path)]
    devices = [Path("/dev", name) for name in _DEVICES]
    kernel.restrict_files([*readable, file, *devices], [work, Path("/dev/null")])


def _limit(limits: dict[str, Any], processes: int) -> None:
    """The kernel's own limits: of each process, and of all processes of the user (RLIMIT_NPROC)."""
    memory, cpu = limits["memory_mib"] << 20, int(limits["cpu_seconds"]) + 1
    values = {
        "AS": (memory, memory),
        "DATA": (memory, memory),
        "CPU": (cpu, cpu + 1),
        "FSIZE": (limits["file_mib"] << 20,) * 2,
        "NOFILE": (limits["open_files"],) * 2,
        "NPROC": (processes, processes),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    for name, pair in values.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), pair)
