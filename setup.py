"""Build the native modules with CMake; everything else is in pyproject.toml.

One module per kernel target lands in deepseek_ops/_native/:
  emulated, checked   when a C++20 compiler and CMake are found
  cuda                when nvcc 12.9 or newer is found too (required with DEEPSEEK_OPS_CUDA=on)
Without them the package installs as pure Python and `python -m deepseek_ops.info` says what is missing:
pip hides build output, so the message has to come from the package. torch is never needed to build.

Environment: DEEPSEEK_OPS_CUDA=auto|on|off, CUDACXX or CUDA_HOME to find nvcc, CXX, MAX_JOBS for parallel compiles.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("_toolchain", ROOT / "deepseek_ops" / "_toolchain.py")
assert _spec and _spec.loader
toolchain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toolchain)


def targets() -> list[str]:
    """The native modules that this machine can build; DEEPSEEK_OPS_CUDA=on makes a missing `cuda` an error."""
    problems = {target: toolchain.problem(target) for target in toolchain.TARGETS}
    if toolchain.cuda_mode() == "on" and problems["cuda"]:
        raise SystemExit(f"DEEPSEEK_OPS_CUDA=on, but {problems['cuda']}")
    for target, problem in problems.items():
        if problem:
            print(f"deepseek_ops: not building {target}: {problem}", file=sys.stderr)
    return [target for target, problem in problems.items() if not problem]


class CMakeBuild(build_ext):
    """Configure once, build every target; the build folder persists so that an editable install is incremental."""

    def run(self) -> None:
        """Build into the package (editable) or the wheel's folder; a compile error fails the install."""
        names = [extension.name.rsplit(".", 1)[1] for extension in self.extensions]
        if not names:
            return
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "deepseek_ops: building needs pybind11: pip install pybind11, or install without --no-build-isolation"
            ) from None

        first = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        with toolchain.locked(build):
            toolchain.configure(
                ROOT, build, names, pybind11.get_cmake_dir(), DEEPSEEK_OPS_OUTPUT=first.parent
            )
            toolchain.build(build)

    def get_outputs(self) -> list[str]:
        """Only files that exist: a target that cannot be built here is absent, not an error."""
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    ext_modules=[Extension(f"deepseek_ops._native.{name}", sources=[], optional=True) for name in targets()],
    cmdclass={"build_ext": CMakeBuild},
)
