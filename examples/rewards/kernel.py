"""The doors to the Linux kernel that Python 3.11 has no function for: namespaces, mounts, prctl, Landlock.

Everything goes through ctypes on the C library that the interpreter already uses, so that the sandbox needs no package
and no compiler. A call that fails raises `OSError` with the name of the call, which is what `protection()` reports.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 24, 36, 38
_SECCOMP_MODE_FILTER = 2
_LAST_CAPABILITY = 63  # dropping one that the kernel does not know is EINVAL

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # on every machine


def _call(name: str, *arguments: object) -> int:
    result = getattr(_LIBC, name)(*arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _system_call(name: str, number: int, *arguments: object) -> int:
    result = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


# --- processes ---------------------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` (CLONE_NEW*); a new PID namespace begins with the next child."""
    _call("unshare", ctypes.c_int(flags))


def _prctl(option: int, value: int = 0) -> None:
    zero = ctypes.c_ulong(0)
    _call("prctl", ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero)


def die_with_parent(signal: int) -> None:
    """Receive `signal` when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent has ended, double-forked ones included."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """No process of the same user may trace this one or read its memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_privileges(uid: int | None) -> None:
    """Give up what root or a user namespace gives, for good: capabilities, and set-user-id programs.

    uid: also become that user and group; None: stay who we are (the next exec drops the capabilities).
    """
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # unknown to this kernel, or an ordinary user who has none
            break
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """Install a seccomp filter (`examples.rewards.seccomp`); needs `drop_privileges` before it."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _call("prctl", ctypes.c_int(_PR_SET_SECCOMP), mode, ctypes.c_void_p(ctypes.addressof(holder)), zero, zero)


# --- mounts ------------------------------------------------------------------------------------------------------


def mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    _call(
        "mount",
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )


def bind_read_only(source: Path, target: Path, *, device: bool = False) -> None:
    """Show `source` (a file or a whole tree) at `target` without a way to write to it. Linux 5.12."""
    mount(str(source), target, None, MS_BIND | MS_REC)
    flags = MS_NOSUID if device else MS_RDONLY | MS_NOSUID | MS_NODEV
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", flags, 0, 0, 0))
    path = ctypes.c_char_p(os.fsencode(target))
    _system_call(
        "mount_setattr",
        _MOUNT_SETATTR,
        ctypes.c_int(_AT_FDCWD),
        path,
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(32),
    )


def change_root(folder: Path) -> None:
    """Make `folder` (a mount point) the root of this mount namespace; nothing of the old one stays reachable."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root: unknown on {platform.machine()}")
    os.chdir(folder)
    _system_call("pivot_root", number, b".", b".")
    _call("umount2", b".", ctypes.c_int(MNT_DETACH))
    os.chdir("/")


# --- Landlock ----------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR
NEEDED_LANDLOCK = 3  # before it a file could be truncated by its path (Linux 6.2)


def landlock_version() -> int:
    """Version of Landlock in this kernel, 0 where it has none."""
    try:
        return _system_call("landlock", _LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def restrict_files(readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """This process and its descendants may read and execute below `readable`, do anything below `writable`, and open
    nothing else; nor, where the kernel can (versions 4 and 6), connect, bind, or signal processes outside."""
    version = landlock_version()
    handled = (1 << (16 if version >= 5 else 15)) - 1
    ruleset = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    buffer = ctypes.create_string_buffer(ruleset, len(ruleset))
    fd = _system_call(
        "landlock_create_ruleset", _LANDLOCK_CREATE, buffer, ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    try:
        for rights, paths in ((_READ, readable), (handled, writable)):
            for path in paths:
                _allow(fd, path, rights)
        _system_call("landlock_restrict_self", _LANDLOCK_RESTRICT, ctypes.c_int(fd), ctypes.c_uint(0))
    finally:
        os.close(fd)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not path.is_dir():
            rights &= _OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, file), 12)
        _system_call(
            "landlock_add_rule",
            _LANDLOCK_ADD,
            ctypes.c_int(ruleset),
            ctypes.c_int(1),
            rule,
            ctypes.c_uint(0),
        )
    finally:
        os.close(file)
