"""Native modules of the toy family (tests/csrc/toy): what the tests of the bindings call.

The project's own CMakeLists.txt builds them from another list of kernels, beside the real modules.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_ops import _toolchain

ROOT = Path(__file__).parents[1]
FOLDER = (
    ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
)  # the installation's: only the toy is compiled


@functools.cache
def toy_modules() -> dict[str, Any]:
    """target -> module, of those that this machine can build; skips where there is none."""
    targets = [target for target in _toolchain.TARGETS if not _toolchain.problem(target)]
    if not targets:
        pytest.skip(f"no native module can be built: {_toolchain.problem('emulated')}")
    pybind11 = pytest.importorskip("pybind11")
    with _toolchain.locked(FOLDER):  # pytest-xdist: one worker builds, the others wait
        kernels = ROOT / "tests" / "csrc" / "toy" / "kernels.json"
        pybind11_dir = pybind11.get_cmake_dir()
        _toolchain.configure(ROOT, FOLDER, targets, pybind11_dir, DEEPSEEK_OPS_TEST_KERNELS=kernels)
        _toolchain.build(FOLDER, "test_modules")
    return {target: _load(target) for target in targets}


def toy_module(target: str) -> Any:
    """The module of one target; skips where it cannot be built."""
    modules = toy_modules()
    if target not in modules:
        pytest.skip(f"no toy module for {target}: {_toolchain.problem(target)}")
    return modules[target]


def _load(target: str) -> Any:
    path = next((FOLDER / "test").glob(f"{target}.*.so"))
    spec = importlib.util.spec_from_file_location(target, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
