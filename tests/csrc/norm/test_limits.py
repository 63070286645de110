"""Host limits of RMSNorm and SwiGLU, in C++: limits_test.cpp, compiled and run."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.building import ROOT, output_of, program

SOURCES = ("norm/rms_norm", "norm/rms_norm_backward", "activation/swiglu", "activation/swiglu_backward")


def test_limits_are_sentences_and_come_before_any_launch():
    kernels = [ROOT / f"csrc/{name}.cu" for name in (*SOURCES, "activation/swiglu_backward_quantize")]
    output_of(program("norm_limits", [Path(__file__).with_name("limits_test.cpp"), *kernels]))
