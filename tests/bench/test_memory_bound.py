"""The table of bench.memory_bound without a GPU: floors, arguments, and what counts as agreement."""

from __future__ import annotations

import pytest
import torch

from bench import memory_bound
from bench.proof.claims import MEMORY_BOUND_CLAIMS
from bench.proof.steps import MEMORY_BOUND
from deepseek_ops._registry import absent_reason


def test_floors_are_those_of_the_outputs(monkeypatch):
    """Each floor counts every byte of inputs and outputs of the call itself, but for statistics and weights by rows."""
    monkeypatch.setattr(memory_bound, "bf16", lambda r, c: torch.randn(r, c).bfloat16())
    monkeypatch.setattr(memory_bound, "norm_weight", lambda c: torch.ones(c))
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.ones(n))
    for kernel in memory_bound.KERNELS:
        rows, columns = 128, 1024
        call = kernel.make(rows, columns)
        inputs = [
            c.cell_contents for c in call.__closure__ or () if isinstance(c.cell_contents, torch.Tensor)
        ]
        moved = inputs + memory_bound.tensors(call())
        size = sum(t.numel() * t.element_size() for t in moved)
        assert (
            kernel.floor_bytes(rows, columns)
            <= size
            <= kernel.floor_bytes(rows, columns) + 12 * (rows + columns)
        ), kernel.name


def test_claims_and_steps_name_what_there_is():
    names = {kernel.name for kernel in memory_bound.KERNELS}
    assert set(MEMORY_BOUND_CLAIMS) <= names
    assert {family for family, _ in MEMORY_BOUND_CLAIMS.values()} == set(MEMORY_BOUND)
    assert {kernel.family for kernel in memory_bound.KERNELS} == set(MEMORY_BOUND)


def test_agreement():
    x = torch.randn(64, 64)
    assert memory_bound.agrees((x, None), (x * (1 + 2**-20), None)) == ""
    assert "differs" in memory_bound.agrees(x, x * 1.01)
    assert "shape" in memory_bound.agrees(x, x.bfloat16())
    codes = x.to(torch.float8_e4m3fn)
    off = codes.view(torch.uint8).clone()
    off[0, 0] ^= 4
    assert memory_bound.agrees(codes, codes) == ""
    assert "codes" in memory_bound.agrees(codes, off.view(torch.float8_e4m3fn))


def test_without_a_gpu_it_says_so(capsys):
    if absent_reason("cuda") is None:
        pytest.skip("there is a GPU")
    memory_bound.main(["--family", "norm"])
    out = capsys.readouterr().out
    assert "no GPU" in out and "rms_norm_backward" in out and "swiglu" not in out
    with pytest.raises(SystemExit):
        memory_bound.main(["--repeats", "1"])
