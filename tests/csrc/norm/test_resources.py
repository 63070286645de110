"""No spills, and as many blocks on an SM as the schedule counts on."""

from __future__ import annotations

import re

from tests.csrc.building import resources


def test_forward():
    entries = resources("rms_norm")
    assert len(entries) == 16  # types, held or not, residual, codes
    held = {
        e.mangled: e for e in entries if re.search(r"(4bf16E|If)Lb1E", e.mangled)
    }  # one patch, in registers
    assert len(held) == 8
    for name, entry in held.items():
        alone = "4bf16ELb1ELb0E" in name  # bf16 without residual
        assert entry.blocks_by_registers(448) >= (2 if alone else 1), entry
    for entry in entries:
        if entry.mangled not in held:
            assert entry.blocks_by_registers(512 if "4bf16" in entry.mangled else 256) >= 1, entry


def test_backward():
    entries = resources("rms_norm_backward")
    assert len(entries) == 4
    assert all(e.blocks_by_registers(512) >= 1 for e in entries if "rms_norm_backward_kernel" in e.mangled)
