"""Builds the cases of kernels/*.cu once and runs them: what the tests of this folder share."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = Path(__file__).with_name("kernels")
EMULATOR = ROOT / "csrc" / "emulator"
FOLDER = ROOT / "build" / "planted"

ASYNCHRONY = ("eager", "random", "lazy")
SCHEDULES = ("fifo", "random", "starve", "pct")
MODES = list(itertools.product(range(len(ASYNCHRONY)), range(len(SCHEDULES))))

FLAGS = ["-std=c++20", "-g", "-DHOPPER_EMULATED", "-fPIC", "-ffp-contract=off", "-Wno-psabi"]
PLAIN = [*FLAGS, "-O2"]
WATCHED = [*FLAGS, *["-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-x", "c++"]]


def object_file(folder: Path, source: Path, flags: list[str], headers: bytes) -> Path:
    """The object of a source, named by a hash of all that it is made from: compiled only when that has changed."""
    key = hashlib.sha256(b"\0".join([source.read_bytes(), headers, *map(str.encode, [str(source), *flags])]))
    target = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        for old in folder.glob(f"{source.stem}-*.o"):
            old.unlink()
        compiler = [shutil.which("ccache"), "g++"] if shutil.which("ccache") else ["g++"]
        partial = target.with_suffix(".partial")
        command = [*compiler, *flags, "-c", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        partial.rename(target)
    return target


def build(
    folder: Path, plain: list[Path], watched: list[Path], extra: tuple[str, ...] = (), name: str = "library"
) -> Path:
    """A library of host sources and of kernels whose every access is watched; workers of pytest-xdist take turns.

    Libraries of one folder share the objects of their common sources, the emulator's above all.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    headers = b"".join(
        f.read_bytes()
        for base in (ROOT / "csrc", KERNELS)
        for f in sorted(base.rglob("*"))
        if f.suffix in (".h", ".cuh")
    )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Wide kernels first; two at a time, as many as CI has cores.
        jobs = [(s, [*PLAIN, *extra]) for s in plain] + [(s, [*WATCHED, *extra]) for s in watched]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            objects = list(pool.map(lambda job: object_file(folder, *job, headers), jobs))
        key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:20]
        library = folder / f"{name}-{key}.so"
        if not library.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            # What is not watched first: of inline functions that both contain, the linker keeps the first copy.
            subprocess.run(
                ["g++", "-shared", "-o", str(library), *map(str, objects), "-ldl"],
                check=True,
                capture_output=True,
            )
    return library


def emulator_sources() -> list[Path]:
    return sorted(EMULATOR.glob("*.cpp"))


class Planted:
    """The library of cases. A bug's expectation is a set of rules, each of which may name it; "data": wrong results."""

    def __init__(self) -> None:
        self.path = build(
            FOLDER, [*emulator_sources(), KERNELS / "library.cpp"], sorted(KERNELS.glob("*.cu"))
        )
        self.library = ctypes.CDLL(str(self.path))
        for name in ("list", "run", "rules", "drop_sites"):
            getattr(self.library, f"planted_{name}").restype = ctypes.c_char_p
        for name in ("digest", "switches", "accesses", "bank_conflicts"):
            getattr(self.library, f"planted_{name}").restype = ctypes.c_uint64
        self.library.planted_seconds.restype = ctypes.c_double
        self.expected: dict[str, list[set[str]]] = {}
        for item in self.library.planted_list().decode().split(";")[:-1]:
            name, bugs = item.split("=")
            self.expected[name] = [set(bug.split("|")) - {""} for bug in bugs.split(",")] if bugs else []
        self.rules = self.library.planted_rules().decode().split(";")[:-1]

    def run(
        self, case: str, bug: int = 0, seed: int = 0, asynchrony: int = 1, schedule: int = 1, check: bool = True,
        off: str = "", drop: tuple[str, str] = ("", ""),
    ) -> str:  # fmt: skip
        """The report; "data: ..." for wrong results without one; "" when all is well."""
        texts = [t.encode() for t in (off, *drop)]
        name = case.encode()
        return self.library.planted_run(
            name, bug, ctypes.c_uint64(seed), asynchrony, schedule, check, *texts
        ).decode()

    def digest(self) -> int:
        return self.library.planted_digest()


def rules_in(report: str) -> set[str]:
    """The rules that a report names."""
    return (
        {"data"} if report.startswith("data") else set(re.findall(r"^\[([a-z_.]+)\]", report, re.MULTILINE))
    )


def case_names() -> list[str]:
    """Of all cases, without building them."""
    return [
        n
        for f in sorted(KERNELS.glob("*.cu"))
        for n in re.findall(r"^CASE\((\w+)", f.read_text(), re.MULTILINE)
    ]
