"""Host limits of the MoE kernels and offsets past 2^32, in C++: limits_test.cpp, compiled and run."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.building import ROOT, output_of, program


def test_limits_are_sentences_and_offsets_are_wide():
    kernels = [ROOT / f"csrc/moe/{name}.cu" for name in ("route", "balance", "permute", "unpermute")]
    output_of(program("moe_limits", [Path(__file__).with_name("limits_test.cpp"), *kernels]))
