"""No spills, and as many blocks on an SM as the schedule counts on."""

from __future__ import annotations

from tests.csrc.resources import compile_kernels


def test_forward(tmp_path):
    entries = compile_kernels("activation/swiglu.cu", tmp_path)
    assert len(entries) == 8
    for entry in entries:
        assert entry.blocks(128) >= (4 if "4bf16" in entry.name else 2), entry


def test_backward(tmp_path):
    entries = compile_kernels("activation/swiglu_backward.cu", tmp_path)
    assert len(entries) == 4
    for entry in entries:
        assert entry.blocks(128) >= (4 if "4bf16" in entry.name else 2), entry


def test_backward_with_casts(tmp_path):
    entries = compile_kernels("activation/swiglu_backward_quantize.cu", tmp_path)
    casts = [e for e in entries if "swiglu_backward_quantize_kernel" in e.name]
    assert len(casts) == 2 and len(entries) == 4  # and the padding of offsets, and the sum of row weights
    assert all(e.blocks(256) >= 2 for e in casts)
