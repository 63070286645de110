"""What was measured here replaces what others published, for the same card only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.plan.hardware import EFFICIENCIES, get_hardware
from examples.plan.ledger import FOLDER, measured


def ledger(folder: Path, device: str, began: str, rows: list[dict], status: str = "ok") -> None:
    step = {
        "name": "bench-x", "kind": "benchmark", "family": "gemm", "status": status, "reason": "", "began": began,
        "seconds": 1, "clocks": [], "data": {"rows": rows}, "log": "",
    }  # fmt: skip
    content = {
        "schema": 1, "began": began, "ended": began, "budget_minutes": 1, "family": None,
        "revision": {"commit": "", "dirty": False, "tree": "0" * 12},
        "device": {"name": device, "driver": "1", "memory_mib": 1, "capability": "9.0"}, "steps": [step],
    }  # fmt: skip
    (folder / f"{began[:10]}.json").write_text(json.dumps(content))


def row(kernel: str, tflops: float, us: float = 200.0, correct: bool = True) -> dict:
    return {
        "kernel": kernel,
        "shape": "",
        "candidates": {"ours": {"tflops": tflops, "median_us": us, "correct": correct}},
    }


H200 = "NVIDIA H200"


def test_replaces_by_the_median_of_large_correct_rows(tmp_path: Path) -> None:
    rows = [
        row("fp8_gemm", 1000), row("fp8_gemm", 1400), row("fp8_gemm", 1200),
        row("fp8_gemm", 10, us=5),  # too small to fill a GPU
        row("fp8_gemm", 1900, correct=False),
        row("bf16_gemm", 700), row("fp8_gemm_masked", 1),
    ]  # fmt: skip
    ledger(tmp_path, H200, "2027-01-01T00:00:00", rows)
    found = measured(get_hardware("h200"), EFFICIENCIES, tmp_path)
    assert found.fp8_dense.kind == "measured" and "2027-01-01.json" in found.fp8_dense.source
    assert found.fp8_dense.number == pytest.approx(1200 / 1979)
    assert found.bf16_gemm.number == pytest.approx(700 / 989)
    assert found.fp8_grouped == EFFICIENCIES.fp8_grouped
    assert measured(get_hardware("h100"), EFFICIENCIES, tmp_path) == EFFICIENCIES
    assert measured(get_hardware("h20"), EFFICIENCIES, tmp_path) == EFFICIENCIES


def test_the_newest_run_counts(tmp_path: Path) -> None:
    ledger(tmp_path, H200, "2027-01-01T00:00:00", [row("fp8_gemm", 1000)])
    ledger(tmp_path, H200, "2027-02-01T00:00:00", [row("fp8_gemm", 1300)])
    ledger(tmp_path, H200, "2027-03-01T00:00:00", [row("fp8_gemm", 1)], status="failed")
    assert measured(get_hardware("h200"), EFFICIENCIES, tmp_path).fp8_dense.number == pytest.approx(
        1300 / 1979
    )


def test_the_folder_is_the_repository_s() -> None:
    assert (FOLDER / "README.md").is_file()
