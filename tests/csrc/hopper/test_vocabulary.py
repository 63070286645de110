"""Rules of the vocabulary's sources, and the host bodies of its conversions against torch."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.csrc import building

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"


def test_inline_ptx_stays_in_the_vocabulary() -> None:
    word = re.compile(r"\basm\b")
    elsewhere = [
        path.relative_to(CSRC).as_posix()
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in (".h", ".cuh", ".cu", ".cpp")
        and path.parent.name != "hopper"
        and path.name != "fiber.cpp"  # the emulator's own context switch, host assembler
        and word.search(re.sub(r"//.*", "", path.read_text()))
    ]
    assert elsewhere == []


def test_generated_shapes_are_up_to_date() -> None:
    script = CSRC / "hopper" / "generate_wgmma.py"
    fresh = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert fresh.stdout == (CSRC / "hopper" / "wgmma_shapes.h").read_text()


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    return building.library("conversions", [HERE / "conversions.cpp"], runtime=False)


def convert(library: ctypes.CDLL, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    getattr(library, name)(*pointers, ctypes.c_int64(x.numel()))
    return y


def floats() -> torch.Tensor:
    """Random bits, every e4m3 and bf16 value, the midpoints between neighbours, and one ulp to either side."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    words = torch.arange(1 << 16, dtype=torch.int64)
    bf16 = torch.cat([words << 16, (words << 16) + 0x8000]).to(torch.int32)
    exact = torch.cat([values, middles]).view(torch.int32)
    near = torch.cat([exact, exact + 1, exact - 1, bf16, bf16 + 1, bf16 - 1])
    return torch.cat([bits, near]).view(torch.float32)


def test_to_e4m3_saturates_and_rounds_to_even(host: ctypes.CDLL) -> None:
    x = floats()
    got = convert(host, "to_e4m3", x, torch.uint8)
    finite = (
        x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    )  # torch saturates only after the clamp
    assert torch.equal(got[~x.isnan()], finite[~x.isnan()])
    assert (got[x.isnan()] == 0x7F).all()


def test_to_bf16_rounds_to_even(host: ctypes.CDLL) -> None:
    x = floats()
    got = convert(host, "to_bf16", x, torch.int16)
    expected = x.to(torch.bfloat16).view(torch.int16)
    assert torch.equal(got[~x.isnan()], expected[~x.isnan()])
    assert (got[x.isnan()] == 0x7FFF).all()


def test_every_code_back_to_float(host: ctypes.CDLL) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = convert(host, "from_e4m3", codes, torch.float32)
    assert torch.equal(got.nan_to_num(1e9), codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9))
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    got = convert(host, "from_bf16", words, torch.float32)
    assert torch.equal(got.view(torch.int32), words.to(torch.int32) << 16)
