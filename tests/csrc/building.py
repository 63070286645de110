"""The one place that compiles for tests: shared libraries and programs of C++ sources and of kernels.

An object is compiled once and serves every test, every worker of pytest-xdist and the next run:

- Objects that the package's own build holds (the emulator, the kernels of csrc/kernels.json) are that build's: Ninja is
  asked for them, so that it brings up to date what a changed header reaches, and for no more. Without such a folder they
  are compiled here, with the same flags.
- All others lie in build/test_objects, in a slot for each source and command. What a source includes stands in the
  dependency file of its last compile; an object's name ends in a digest of the contents of all that. So it is fresh when
  a file of the name that those contents give now is there, and a killed worker leaves no more than a temporary file.
- A slot has a lock. A worker holds one at a time and waits for none while it holds it; it goes first for objects that
  nobody else is compiling.

Flags are those of CMakeLists.txt, for all; `extra` is for tests with a reason.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import kernels
from deepseek_ops import _toolchain

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "test_objects"
PACKAGE = kernels.FOLDER

# CMakeLists.txt says why.
PLAIN = (
    *("-std=c++20", "-O2", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-DHOPPER_EMULATED"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
WATCHED = (*PLAIN, "-g", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
STRICT = ("-Werror",)  # for sources that promise to be without warnings
DEVICE = ("-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Werror", "all-warnings")

EMULATOR = sorted((CSRC / "emulator").glob("*.cpp"))
RUNTIME = [*EMULATOR, ROOT / "tests/csrc/drop_sites.cpp"]  # what every run of a kernel needs


class BuildError(AssertionError):
    """What the compiler says."""


# ---- what tests ask for ------------------------------------------------------------------------------------------------


def library(
    name: str,
    plain: Sequence[Path],
    watched: Sequence[Path] = (),
    extra: Sequence[str] = (),
    runtime: bool = True,
) -> ctypes.CDLL:
    """A loaded library of sources and of kernels whose every access is reported to the checker; `runtime`: the emulator too."""
    # What is not watched first: of inline functions that both contain, the linker keeps the first copy, and the checker
    # must not run watched code itself.
    sources = [*(RUNTIME if runtime else ()), *plain]
    units = [_unit(s, PLAIN, extra) for s in sources] + [_unit(s, WATCHED, extra) for s in watched]
    return ctypes.CDLL(str(_linked(f"{name}.so", units, ("-shared",))))


def program(name: str, sources: Sequence[Path], extra: Sequence[str] = ()) -> Path:
    """An executable of these sources alone."""
    return _linked(f"{name}.run", [_unit(source, PLAIN, extra) for source in sources], tuple(extra))


def output_of(program: Path, *arguments: str) -> str:
    """What a test program prints; its exit status must be 0, and 77 skips the test with what it prints."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[:4000] + done.stderr[:4000]
    return done.stdout


def objects(plain: Sequence[Path], extra: Sequence[str] = ()) -> list[Path]:
    """Compiled sources, in order."""
    return _compiled([_unit(source, PLAIN, extra) for source in plain])


def device_object(source: Path, extra: Sequence[str] = ()) -> tuple[Path, str]:
    """A source that is not of the package, compiled by nvcc for sm_90a, and what the compiler says."""
    target = _compiled([_Unit(source, _nvcc(), (*DEVICE, *extra), "cu")])[0]
    return target, target.with_suffix(".log").read_text()


def device_library(name: str, source: Path) -> ctypes.CDLL:
    """The same as a loaded library, with its CUDA runtime."""
    target, _ = device_object(source, ("-Xcompiler=-fPIC,-Wall,-Wextra",))
    return ctypes.CDLL(str(_link(f"{name}.so", [target], (_nvcc(), "-shared"), OBJECTS)))


@functools.cache
def resources(name: str) -> list[kernels.Kernel]:
    """What ptxas made of the package's kernels in csrc's `name`.cu, as its build reported; skips where that cannot be.

    Fails where one spills, uses local memory or is serialised.
    """
    found, log, compiled = _of_file(name)
    assert compiled.exists() and not re.search(r"\(C75\d\d\)|serialized|spilled|Local memory", log), log
    assert found, f"{name}.cu: holds no kernel"
    assert not [kernel.name for kernel in found if kernel.stack_bytes or kernel.spill_bytes]
    return found


@functools.cache
def instructions(name: str) -> dict[str, list[str]]:
    """Mangled name of a kernel in csrc's `name`.cu: its machine code."""
    return machine_code(_of_file(name)[2])


@functools.cache
def _of_file(name: str) -> tuple[list[kernels.Kernel], str, Path]:
    try:
        return kernels.of_file(name)
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))


def machine_code(compiled: Path) -> dict[str, list[str]]:
    """Mangled name of a kernel in an object: its instructions with their operands, without predicates."""
    tool = kernels.disassembler()
    if tool is None:
        pytest.skip("no cuobjdump with nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    return kernels.disassemble(tool, compiled)


# ---- compiling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    source: Path
    compiler: str
    flags: tuple[str, ...]
    language: str = "c++"

    @property
    def home(self) -> Path:
        """Where its files go; those of a source that a test writes, beside it."""
        return OBJECTS if self.source.is_relative_to(ROOT) else self.source.parent

    @property
    def slot(self) -> Path:
        inside = self.home / (self.source.parent.relative_to(ROOT) if self.home == OBJECTS else "objects")
        return inside / f"{self.source.name}.{_digest([_version(self.compiler), *self.flags])[:8]}"


def _unit(source: Path, flags: tuple[str, ...], extra: Sequence[str]) -> _Unit:
    return _Unit(source, _compiler(), (*flags, *extra))


def _compiled(units: list[_Unit]) -> list[Path]:
    done = _of_the_package(units)
    jobs = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 4))
    jobs = max(1, jobs // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    for blocking in (False, True):
        rest = [
            unit for unit in dict.fromkeys(reversed(units)) if unit not in done
        ]  # watched ones take longest
        with ThreadPoolExecutor(jobs) as pool:
            try:
                found = list(pool.map(functools.partial(_compile, blocking=blocking), rest))
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
        done |= {unit: path for unit, path in zip(rest, found, strict=True) if path}
    return [done[unit] for unit in units]


def _compile(unit: _Unit, blocking: bool) -> Path | None:
    """The unit's object; None where somebody else is at it and we do not wait."""
    unit.slot.parent.mkdir(parents=True, exist_ok=True)
    with _locked(unit.slot, blocking) as mine:
        if not mine:
            return None
        target = _with_suffix(unit.slot, f".{_contents(unit)}.o")
        if target.exists():
            return target
        for old in unit.slot.parent.glob(f"{unit.slot.name}.*"):
            if old.suffix != ".lock":
                old.unlink()
        partial, dependencies = _with_suffix(unit.slot, ".partial.o"), _with_suffix(unit.slot, ".partial.d")
        ccache = [path] if (path := shutil.which("ccache")) else []
        command = [*ccache, unit.compiler, *unit.flags, "-MMD", "-MF", str(dependencies)]
        command += ["-x", unit.language, "-c", str(unit.source), "-o", str(partial)]
        started = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{said}")
        dependencies.replace(_with_suffix(unit.slot, ".d"))
        changed = any(path.stat().st_mtime >= started for path in _inputs(unit))  # under the compiler's hands
        target = _with_suffix(unit.slot, f".{secrets.token_hex(10) if changed else _contents(unit)}.o")
        target.with_suffix(".log").write_text(said)
        partial.replace(target)
        return target


def _inputs(unit: _Unit) -> list[Path]:
    """The source and all that its last compile included, except headers of the system."""
    rule = _with_suffix(unit.slot, ".d").read_text().replace("\\\n", " ").split(": ", 1)[1]
    return [Path(path.replace("\\ ", " ")) for path in re.split(r"(?<!\\)\s+", rule) if path]


def _contents(unit: _Unit) -> str:
    """Digest of the inputs as they are now; "none" where there was no compile or one of them is gone."""
    try:
        return _digest([part for path in _inputs(unit) for part in (str(path), _digest_of(path))])
    except FileNotFoundError:
        return "none"


def _linked(name: str, units: list[_Unit], flags: tuple[str, ...]) -> Path:
    home = next((unit.home for unit in units if unit.home != OBJECTS), OBJECTS)
    return _link(name, _compiled(units), (_compiler(), *flags), home)


def _link(name: str, objects: list[Path], linker: tuple[str, ...], home: Path) -> Path:
    """Of a name, the newest two are kept: another worker may be about to load the one before."""
    state = (f"{path} {path.stat().st_mtime_ns}" for path in objects)
    stem, suffix = name.split(".")
    target = home / f"{stem}.{_digest([*linker, *state])}.{suffix}"
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / name, True):
        if not target.exists():
            partial = home / f"{name}.partial"
            command = [*linker, "-o", str(partial), *map(str, objects), *_libraries(), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            partial.replace(target)
            for old in sorted(home.glob(f"{stem}.*.{suffix}"), key=os.path.getmtime)[:-2]:
                old.unlink()
    return target


# ---- what the package has compiled ---------------------------------------------------------------------------------------


def _of_the_package(units: Iterable[_Unit]) -> dict[_Unit, Path]:
    """Objects of the package's own build, brought up to date; none where it is not there, not Ninja's, or fails."""
    found = {unit: path for unit in units if (path := _package_object(unit)) and path.exists()}
    done: dict[_Unit, Path] = {}
    if not (PACKAGE / "build.ninja").exists():
        return done
    for emulator in (True, False):  # a kernel that does not compile costs no more than itself
        part = {unit: path for unit, path in found.items() if (unit.source in EMULATOR) == emulator}
        targets = sorted({str(path.relative_to(PACKAGE)) for path in part.values()})
        with _toolchain.locked(PACKAGE):
            if targets and _toolchain.refresh(PACKAGE, targets):
                done |= part
    return done


def _package_object(unit: _Unit) -> Path | None:
    objects = PACKAGE / "CMakeFiles"
    if unit.source in EMULATOR and unit.flags == PLAIN:
        return objects / "emulator_runtime.dir" / f"{unit.source.relative_to(ROOT)}.o"
    target = {PLAIN: "emulated", WATCHED: "checked"}.get(unit.flags)
    wrapper = PACKAGE / "kernels" / f"{unit.source.stem}.emu.cpp"
    if target is None or not wrapper.exists() or str(unit.source) not in wrapper.read_text():
        return None
    return objects / f"kernels_{target}_kernels.dir" / "kernels" / f"{wrapper.name}.o"


@functools.cache
def _libraries() -> list[str]:
    """What the package's emulator needs in a link."""
    library = _toolchain.variable(PACKAGE, "BOOST_CONTEXT_LIBRARY")
    return [library] if library and os.path.exists(library) else []


# ---- tools -------------------------------------------------------------------------------------------------------------


def _compiler() -> str:
    path = _toolchain.find_compiler()
    if path is None:
        pytest.skip("no C++ compiler")
    return path


def _nvcc() -> str:
    path = _toolchain.find_nvcc()
    if path is None:
        pytest.skip("no nvcc")
    return path


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@contextmanager
def _locked(slot: Path, blocking: bool) -> Iterator[bool]:
    """Holds the slot's lock; False where another has it and we do not wait. The kernel frees the locks of the dead."""
    with open(_with_suffix(slot, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _with_suffix(slot: Path, suffix: str) -> Path:
    return slot.with_name(slot.name + suffix)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _digest_of(path: Path) -> str:
    status = path.stat()
    return _digest_of_version(path, status.st_mtime_ns, status.st_size)


@functools.cache
def _digest_of_version(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
