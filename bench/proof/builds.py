"""Compiles bench/probes/<name>.cu twice into shared libraries: nvcc for sm_90a, g++ against the emulator.

Both carry one C function, `probe_run` (bench/probes/probe.h), so that the same call gives silicon's answer and the
emulator's. Results are cached under build/prove by a digest of everything they were made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .revision import ROOT

PROBES = ROOT / "bench" / "probes"
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "prove"
TARGETS = ("cuda", "emulated")  # and "checked": the emulator with hazard detection, for tests
GENCODE = "-gencode=arch=compute_90a,code=sm_90a"  # -arch=sm_90a would also run an sm_90 pass, which refuses


class BuildError(RuntimeError):
    """A compiler is missing or refused; the message has the command and what it said."""


def nvcc() -> str | None:
    """CUDACXX, CUDA_HOME, PATH, the usual prefix; None when there is no CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def host_compiler() -> str | None:
    """A C++20 compiler for the emulator."""
    return next(
        (path for c in (os.environ.get("CXX"), "g++", "c++") if c and (path := shutil.which(c))), None
    )


def sources() -> list[str]:
    """Names of the probes' source files."""
    return sorted(path.name for path in PROBES.glob("*.cu"))


def build(source: str, target: str) -> Path:
    """The shared library of a probe source for "cuda" or "emulated"; BuildError tells what went wrong."""
    if target == "cuda":
        compiler = nvcc()
        if compiler is None:
            raise BuildError("nvcc not found (looked at CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
        inputs = [PROBES / source, *PROBES.glob("*.h"), *_headers("hopper", "common")]
        command = [
            compiler, "-std=c++20", "-O3", GENCODE, "-cudart=static", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v", str(PROBES / source),
        ]  # fmt: skip
        return _cached(f"{Path(source).stem}.cuda", inputs, command)
    if target not in ("emulated", "checked"):
        raise ValueError(f"target: must be one of {', '.join((*TARGETS, 'checked'))}; got {target!r}")
    compiler = host_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (looked at CXX, g++, c++)")
    inputs = [PROBES / source, *PROBES.glob("*.h"), *_headers("hopper", "common", "emulator")]
    command = [compiler, *HOST_FLAGS, *(CHECK_FLAGS if target == "checked" else []), "-x", "c++", "-c"]
    # Instrumented code is never linked with -fsanitize: the emulator has its own runtime behind the call-outs. Its objects
    # come first, so that of inline functions that both have (std::string) the linker keeps the uninstrumented copy.
    kernel = _cached(f"{Path(source).stem}.{target}", inputs, [*command, str(PROBES / source)], ".o")
    objects = [*_emulator_objects(compiler), kernel]
    link = [compiler, "-shared", "-Wl,--no-undefined", *map(str, objects), *_boost()]
    return _cached(f"{Path(source).stem}.{target}", objects, link)


CHECK_FLAGS = ["-g", "-DPROBE_CHECKED", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
HOST_FLAGS = [
    "-std=c++20", "-O2", "-DHOPPER_EMULATED", "-ffp-contract=off", "-Wno-psabi", "-fPIC", "-fvisibility=hidden",
]  # fmt: skip


def build_all(names: Iterable[str] | None = None, targets: Iterable[str] = TARGETS) -> dict[str, str]:
    """Build every probe in parallel: {"<source>:<target>": "" or what went wrong}."""
    jobs = [(name, target) for name in (names or sources()) for target in targets]
    if "emulated" in targets and (compiler := host_compiler()):
        try:
            _emulator_objects(compiler)  # once, before the threads ask for them
        except BuildError as error:
            return {f"{name}:{target}": str(error) for name, target in jobs}

    def one(job: tuple[str, str]) -> tuple[str, str]:
        try:
            build(*job)
            return f"{job[0]}:{job[1]}", ""
        except BuildError as error:
            return f"{job[0]}:{job[1]}", str(error)

    with ThreadPoolExecutor(_jobs()) as pool:
        return dict(pool.map(one, jobs))


def ptxas_log(source: str) -> str:
    """What ptxas said about the device build of a probe (registers, spills, notices)."""
    log = build(source, "cuda").with_suffix(".log")
    return log.read_text() if log.exists() else ""


def _emulator_objects(compiler: str) -> list[Path]:
    files = sorted((CSRC / "emulator").glob("*.cpp"))
    if not files:
        raise BuildError("csrc/emulator has no sources")
    headers = _headers("hopper", "common", "emulator")

    def compile_one(file: Path) -> Path:
        flags = [*HOST_FLAGS, *(["-DEMULATOR_BOOST_CONTEXT"] if _boost() else [])]
        return _cached(f"emulator-{file.stem}", [file, *headers], [compiler, *flags, "-c", str(file)], ".o")

    with ThreadPoolExecutor(_jobs()) as pool:
        return list(pool.map(compile_one, files))


def _boost() -> list[str]:
    """Boost.Context switches fibers faster; the emulator has its own way without."""
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib"):
        library = Path(folder) / "libboost_context.a"
        if library.exists() and Path("/usr/include/boost/context/detail/fcontext.hpp").exists():
            return [str(library)]
    return []


def _headers(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((CSRC / folder).glob("*"))
        if path.suffix in (".h", ".cuh")
    ]


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)


def _cached(stem: str, inputs: list[Path], command: list[str], suffix: str = ".so") -> Path:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted(inputs):
        digest.update(str(path).encode() + b"\0" + path.read_bytes())
    result = CACHE / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    if result.exists():
        return result
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = result.with_name(f"{result.name}.{os.getpid()}.tmp")
    done = subprocess.run(
        [*command, "-o", str(temporary)], capture_output=True, text=True, errors="replace", check=False
    )
    said = done.stdout + done.stderr
    if done.returncode != 0:
        temporary.unlink(missing_ok=True)
        lines = [
            line for line in said.splitlines() if "error" in line.lower() or "undefined" in line
        ] or said.splitlines()
        raise BuildError(" ".join(command) + "\n" + "\n".join(lines[:20]))
    result.with_suffix(".log").write_text(said)
    os.replace(temporary, result)
    for old in CACHE.glob(f"{stem}-*{suffix}"):  # one generation is enough
        if old != result:
            old.unlink(missing_ok=True)
            old.with_suffix(".log").unlink(missing_ok=True)
    return result
