"""Lists of more than 2^31 elements and limits of the optimizer's host side, in C++: limits_test.cpp."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def test_far_elements_long_lists_and_limits(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "limits"
    command = [compiler, "-std=c++20", "-O0", "-DHOPPER_EMULATED", "-ffp-contract=off", "-Wno-psabi"]
    command += ["-x", "c++", str(Path(__file__).with_name("limits_test.cpp")), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout
