"""No spills, and as many blocks on an SM as the schedule counts on."""

from __future__ import annotations

import re

from tests.csrc.resources import compile_kernels


def test_forward(tmp_path):
    entries = compile_kernels("norm/rms_norm.cu", tmp_path)
    assert len(entries) == 16  # types, held or not, residual, codes
    held = {e.name: e for e in entries if re.search(r"(4bf16E|If)Lb1E", e.name)}  # one patch, in registers
    assert len(held) == 8
    for name, entry in held.items():
        alone = "4bf16ELb1ELb0E" in name  # bf16 without residual
        assert entry.blocks(448) >= (2 if alone else 1), entry
    for entry in entries:
        if entry.name not in held:
            assert entry.blocks(512 if "4bf16" in entry.name else 256) >= 1, entry


def test_backward(tmp_path):
    entries = compile_kernels("norm/rms_norm_backward.cu", tmp_path)
    assert len(entries) == 4
    assert all(e.blocks(512) >= 1 for e in entries if "rms_norm_backward_kernel" in e.name)
