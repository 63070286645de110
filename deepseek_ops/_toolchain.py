"""What a build of the native modules needs, and the sentence that tells what to do where it is missing.

setup.py loads this file by its path, before the package exists: only the standard library may be imported here. The
package asks the same questions later, to say why a backend is absent: pip hides what a build prints.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

TARGETS = ("emulated", "checked", "cuda")
OLDEST_NVCC = (12, 9)
# Needs <source_location>, concepts and a linkable standard library: g++ 11 and clang 16 have them.
_PROBE = "#include <concepts>\n#include <source_location>\n#include <string>\n" + (
    "template <std::integral T> T twice(T x) { return 2 * x; }\n"
    "int main() { return twice(std::string(std::source_location::current().file_name()).size()) == 1; }\n"
)


def cuda_mode() -> str:
    """DEEPSEEK_OPS_CUDA: auto (default), on (missing nvcc is an error) or off."""
    mode = os.environ.get("DEEPSEEK_OPS_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"DEEPSEEK_OPS_CUDA: must be auto, on or off; got {mode!r}")
    return mode


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, PATH, the usual prefix."""
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def find_compiler() -> str | None:
    """The host compiler: CXX (its first word), then c++, g++, clang++."""
    chosen = os.environ.get("CXX", "").split()[:1]
    return next((path for c in chosen or ("c++", "g++", "clang++") if (path := shutil.which(c))), None)


def find_cmake(build: Path | None = None) -> str:
    """The CMake that made the folder `build`, while it works; else the one on PATH."""
    if build is not None:
        own = variable(build, "CMAKE_COMMAND")
        if own and _version(own) == _folder_version(build):
            return own
    return shutil.which("cmake") or "cmake"


def problem(target: str) -> str | None:
    """Why `target` cannot be built on this machine now, with what to do; None when it can."""
    if target == "cuda":
        if cuda_mode() == "off":
            return "DEEPSEEK_OPS_CUDA=off"
        reason = _nvcc_problem()
        if reason:
            return reason
    return _compiler_problem() or _tools_problem()


def configure(source: Path, build: Path, targets: Iterable[str], pybind11: str, **settings: object) -> None:
    """Run CMake's configure step. The build folder persists, so that every path of an earlier environment is renewed.

    A folder belongs to the release of CMake that made it: another one keeps parts of its cache and then fails ("No known
    features for CXX compiler"). pip's build environment and the shell often hold different ones, so that the folder's
    own is used while it exists, and a folder whose CMake is gone is begun anew.
    """
    defines = {
        "CMAKE_BUILD_TYPE": "Release",
        "DEEPSEEK_OPS_TARGETS": ";".join(targets),
        "DEEPSEEK_OPS_NVCC": find_nvcc() or "",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        **settings,
    }
    cmake = find_cmake(build)
    if _version(cmake) != _folder_version(build):
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
    cache = build / "CMakeCache.txt"
    cached = cache.read_text() if cache.exists() else ""
    command = [cmake, "-S", str(source), "-B", str(build)]
    ninja = variable(build, "CMAKE_MAKE_PROGRAM")  # another release may start over from its log
    if not (ninja and os.path.exists(ninja)):
        ninja = shutil.which("ninja")
    if ninja and (not cached or "CMAKE_GENERATOR:INTERNAL=Ninja" in cached):
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    elif "CMAKE_GENERATOR:INTERNAL=Ninja" in cached:  # ninja is gone since
        shutil.rmtree(build)
        cached = ""
    if not cached:  # later CMake keeps its compiler: a change would make it forget everything above
        command.append(f"-DCMAKE_CXX_COMPILER={find_compiler()}")
    subprocess.run([*command, *(f"-D{name}={value}" for name, value in defines.items())], check=True)


def build(folder: Path, target: str = "all") -> None:
    """Run the build; MAX_JOBS compiles at a time (2)."""
    jobs = os.environ.get("MAX_JOBS", "2")
    subprocess.run(
        [find_cmake(folder), "--build", str(folder), "--target", target, "--parallel", jobs], check=True
    )


def refresh(folder: Path, outputs: Iterable[str]) -> bool:
    """Bring these outputs of a configured folder up to date, quietly; False where Ninja cannot (it is gone, or a failure)."""
    ninja = variable(folder, "CMAKE_MAKE_PROGRAM")
    if not (ninja and os.path.exists(ninja) and (folder / "build.ninja").exists()):
        return False
    command = [ninja, "-C", str(folder), "-j", os.environ.get("MAX_JOBS", "2"), *outputs]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two builds at a time would spoil each other's state in a folder: the second one waits."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def variable(build: Path, name: str) -> str | None:
    """A variable of CMake's cache in a build folder."""
    cache = build / "CMakeCache.txt"
    lines = cache.read_text().splitlines() if cache.exists() else []
    return next((line.split("=", 1)[1] for line in lines if re.match(rf"{name}:\w+=", line)), None)


def _nvcc_problem() -> str | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return (
            "no nvcc was found (looked at CUDACXX, CUDA_HOME, PATH, /usr/local/cuda); install the CUDA toolkit 12.9 "
            "or newer, or set CUDA_HOME to it"
        )
    said = _output([nvcc, "--version"])
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None:
        return f"{nvcc} does not work: {_first_line(said)}"
    if (int(version[1]), int(version[2])) < OLDEST_NVCC:
        return (
            f"nvcc {version[1]}.{version[2]} at {nvcc} is too old, the kernels need 12.9 or newer; set CUDACXX or "
            "CUDA_HOME to a newer toolkit"
        )
    return None


def _compiler_problem() -> str | None:
    compiler = find_compiler()
    if compiler is None:
        looked = os.environ.get("CXX") or "c++, g++ and clang++ on PATH"
        return f"no C++ compiler was found (looked for {looked}); install g++ 11 or newer, or set CXX"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(_PROBE)
        command = [compiler, "-std=c++20", str(source), "-o", str(program)]
        said = _output([*command, "-fsyntax-only"])
        plain = Path(folder, "plain.cpp")  # needs a standard library of any age, no C++20
        plain.write_text("#include <string>\nint main() {}\n")
        library = not _output([compiler, str(plain), "-fsyntax-only"])
        if library and re.search(
            r"unrecognized command.line option|invalid value|source_location|concepts", said
        ):
            return (
                f"{compiler} ({_first_line(_output([compiler, '--version']))}) has no C++20; install g++ 11 or newer, "
                "or set CXX to one"
            )
        said = said or _output(command)
        if not program.exists():
            return (
                f"{compiler} cannot build a C++ program ({_first_line(said)}); the C++ standard library may be "
                "missing: install libstdc++ with its headers (package g++ or libstdc++-dev)"
            )
    return None


def _tools_problem() -> str | None:
    if shutil.which("cmake") is None:
        return "cmake was not found; install it: pip install cmake ninja"
    return None


def _version(cmake: str) -> str | None:
    found = re.search(r"version (\d+\.\d+\.\d+)", _output([cmake, "--version"]))
    return found and found[1]


def _folder_version(build: Path) -> str | None:
    parts = [variable(build, f"CMAKE_CACHE_{part}_VERSION") for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part for part in parts if part) or None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stdout + done.stderr


def _first_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return next(iter(errors or text.splitlines()), "it says nothing").strip()
