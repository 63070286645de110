"""Host limits of RMSNorm and SwiGLU, in C++: limits_test.cpp, compiled and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ("norm/rms_norm", "norm/rms_norm_backward", "activation/swiglu", "activation/swiglu_backward")


def test_limits_are_sentences_and_come_before_any_launch(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "limits"
    command = [compiler, "-std=c++20", "-O0", "-DHOPPER_EMULATED", "-ffp-contract=off", "-Wno-psabi"]
    command += ["-x", "c++", str(Path(__file__).with_name("limits_test.cpp"))]
    command += [str(ROOT / f"csrc/{name}.cu") for name in (*SOURCES, "activation/swiglu_backward_quantize")]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
