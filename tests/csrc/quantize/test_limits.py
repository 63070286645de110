"""Host limits of the quantisers, in C++: limits_test.cpp, compiled and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_limits_are_sentences_and_come_before_any_launch(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "limits"
    command = [compiler, "-std=c++20", "-O0", "-DHOPPER_EMULATED", "-ffp-contract=off", "-Wno-psabi"]
    command += ["-x", "c++", str(Path(__file__).with_name("limits_test.cpp"))]
    names = ("quantize_rows", "quantize_columns", "quantize_blocks", "pack_e5m6", "unpack_e5m6", "dequantize")
    command += [str(ROOT / f"csrc/quantize/{name}.cu") for name in names]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_far_elements(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "far"
    command = [compiler, "-std=c++20", "-O0", "-DHOPPER_EMULATED", "-ffp-contract=off", "-Wno-psabi"]
    subprocess.run(
        [*command, "-x", "c++", str(Path(__file__).with_name("far_test.cpp")), "-o", str(program)], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout
