"""Build the native modules with CMake; everything else is in pyproject.toml.

One module per kernel target lands in deepseek_ops/_native/:
  cuda      when nvcc is found (or required with DEEPSEEK_OPS_CUDA=on)
  emulated  when a C++ compiler and CMake are found
Without either the package installs as pure Python and `python -m deepseek_ops.info` says what is missing:
pip hides build output, so the message has to come from the package. torch is never needed to build.

Environment: DEEPSEEK_OPS_CUDA=auto|on|off, CUDACXX or CUDA_HOME to find nvcc, MAX_JOBS for parallel compiles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, PATH, the usual prefix; None when DEEPSEEK_OPS_CUDA=off or absent."""
    mode = os.environ.get("DEEPSEEK_OPS_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"DEEPSEEK_OPS_CUDA: must be auto, on or off; got {mode!r}")
    if mode == "off":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), *(f"{h}/bin/nvcc" for h in homes[:1] if h), shutil.which("nvcc")]
    candidates.append(f"{homes[1]}/bin/nvcc")
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    if mode == "on":
        raise SystemExit(
            "DEEPSEEK_OPS_CUDA=on but no nvcc was found (looked at CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
        )
    return None


def targets() -> list[str]:
    """The native modules that this machine can build."""
    nvcc = find_nvcc()  # first: DEEPSEEK_OPS_CUDA=on must fail loudly whatever else is missing
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not (compiler and shutil.which("cmake")):
        return []
    return ["emulated", *(["cuda"] if nvcc else [])]


class CMakeBuild(build_ext):
    """Configure once, build every target; the build folder persists so that an editable install is incremental."""

    def run(self) -> None:
        """Build into the package (editable) or the wheel's folder; a compile error fails the install."""
        names = [extension.name.rsplit(".", 1)[1] for extension in self.extensions]
        if not names:
            return
        import pybind11

        first = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            "-S", str(ROOT), "-B", str(build),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DDEEPSEEK_OPS_TARGETS={';'.join(names)}",
            f"-DDEEPSEEK_OPS_OUTPUT={first.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        nvcc = find_nvcc()
        if "cuda" in names and nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={shutil.which(nvcc)}")
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", "2")], check=True
        )

    def get_outputs(self) -> list[str]:
        """Only files that exist: a target that cannot be built here is absent, not an error."""
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    ext_modules=[Extension(f"deepseek_ops._native.{name}", sources=[], optional=True) for name in targets()],
    cmdclass={"build_ext": CMakeBuild},
)
