"""tests/conftest.py: one test body for every backend, seeds, skips with reasons, replay."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepseek_ops
from deepseek_ops import _registry
from deepseek_ops.quantize import quantize_1x128

ROOT = Path(__file__).parents[1]


def test_backend_name_chooses_the_backend(backend_name):
    assert _registry.wanted_backends() == (backend_name,)
    q, _ = quantize_1x128(torch.ones(2, 128))
    assert torch.equal(q.float(), torch.full((2, 128), 448.0))


@pytest.mark.emulated(seeds=2, asynchrony="lazy", schedule="pct")
def test_options_of_the_marker(backend_name):
    options = deepseek_ops._emulation._options.get()
    assert options["asynchrony"] == "lazy" and options["schedule"] == "pct" and options["seed"] >= 0


FAILING = """
import pytest
@pytest.mark.emulated(seeds=2)
def test_fails(backend_name):
    assert backend_name == "reference"
"""


def run(folder, *arguments):
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_fails.py").write_text(FAILING)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "test_fails.py",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_a_failure_says_its_seed_and_replays(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = run(tmp_path)
    assert "1 passed" in text
    for name in ("emulated", "checked"):
        reason = _registry.absent_reason(name)
        if reason:
            assert f"backend {name}: " in text
        else:
            assert "replay: pytest --emu-seed " in text and f"test_fails[{name}-1]" in text
    replayed = run(tmp_path, "--emu-seed", "7")
    assert "seed 7;" in replayed or _registry.absent_reason("emulated")
    assert "-1]" not in replayed  # one seed, one run
