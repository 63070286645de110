"""Host limits of the quantisers, in C++: limits_test.cpp, compiled and run."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.building import ROOT, output_of, program


def test_limits_are_sentences_and_come_before_any_launch():
    names = ("quantize_rows", "quantize_columns", "quantize_blocks", "pack_e5m6", "unpack_e5m6", "dequantize")
    kernels = [ROOT / f"csrc/quantize/{name}.cu" for name in names]
    output_of(program("quantize_limits", [Path(__file__).with_name("limits_test.cpp"), *kernels]))


def test_far_elements():
    output_of(program("quantize_far", [Path(__file__).with_name("far_test.cpp")]))
