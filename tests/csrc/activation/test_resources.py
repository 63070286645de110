"""No spills, and as many blocks on an SM as the schedule counts on."""

from __future__ import annotations

from tests.csrc.building import resources


def test_forward():
    entries = resources("swiglu")
    assert len(entries) == 8
    for entry in entries:
        assert entry.blocks_by_registers(128) >= (4 if "4bf16" in entry.mangled else 2), entry


def test_backward():
    entries = resources("swiglu_backward")
    assert len(entries) == 4
    for entry in entries:
        assert entry.blocks_by_registers(128) >= (4 if "4bf16" in entry.mangled else 2), entry


def test_backward_with_casts():
    entries = resources("swiglu_backward_quantize")
    casts = [e for e in entries if "swiglu_backward_quantize_kernel" in e.mangled]
    assert len(casts) == 2 and len(entries) == 4  # and the padding of offsets, and the sum of row weights
    assert all(e.blocks_by_registers(256) >= 2 for e in casts)
