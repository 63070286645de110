"""Sandboxes for tests: skipped only where the machine does not allow one, never because ours is broken."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.errors import UserError
from examples.rewards import kernel
from examples.rewards.sandbox import Sandbox

NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}  # for subprocess: a user without rights


def readable_by_all(path):
    path = Path(path).resolve()
    return all(part.stat().st_mode & 0o005 == 0o005 for part in (path, *path.parents))


def public_python():
    """An interpreter that a user without rights can run; the one of a developer may lie in /root."""
    for python in (getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3"):
        if os.path.exists(python) and readable_by_all(python):
            version = subprocess.run(
                [python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
                capture_output=True,
                check=False,
            )
            if version.stdout.strip() == b"True":
                return python
    return None


def kernel_allows(level, as_nobody=False):
    """Whether this machine has what a level needs, asked without any of our code: for us, or for a user without rights."""
    if sys.platform != "linux":
        return False
    if level == "landlock":
        return kernel.landlock_version() >= kernel.NEEDED_LANDLOCK and platform.machine() in (
            "x86_64",
            "aarch64",
        )
    command = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
    command += ["mount", "-t", "tmpfs", "x", "/mnt"]
    if as_nobody or os.geteuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    release = tuple(map(int, platform.release().split("-")[0].split(".")[:2]))
    return (
        bool(shutil.which("unshare"))
        and release >= (5, 12)
        and not subprocess.run(command, check=False, **(NOBODY if as_nobody else {})).returncode
    )


def make_sandbox(level=None, limits=None):
    """A sandbox of a level, or of any that protects; skips the test where the kernel allows none."""
    allowed = [name for name in ("namespaces", "landlock") if level in (None, name) and kernel_allows(name)]
    python = None
    if os.geteuid() == 0 and (allowed or [level])[0] == "landlock":
        python = public_python()
        if python is None:
            pytest.skip("no interpreter that a user without rights can read")
    try:
        return Sandbox(limits, level=level, python=python)
    except UserError as error:
        if allowed:
            raise
        pytest.skip(str(error))
