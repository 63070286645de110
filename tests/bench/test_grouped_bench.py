"""bench/grouped.py without a GPU: its shapes, its floor (csrc/gemm/README.md), and that it says why it measures nothing."""

from __future__ import annotations

import pytest

from bench import grouped
from bench.proof.steps import GROUPED_SHAPES
from deepseek_ops._registry import absent_reason


def test_sizes_of_groups() -> None:
    for case in grouped.cases(quick=False):
        sizes = case.sizes
        assert len(sizes) == case.groups and min(sizes) >= 1
        assert 0 <= case.groups * case.rows - sum(sizes) <= case.groups
        assert (len(set(sizes)) == 1) == (case.kind != "zipf")
    assert len({case.name for case in grouped.cases(quick=False)}) == len(grouped.cases(quick=False)) == 108


def test_floors_of_the_readme() -> None:
    for kind, groups, rows, n, k, flops, moved in (
        ("uniform", 8, 4096, 4096, 7168, 1014, 155),
        ("uniform", 8, 4096, 7168, 2048, 507, 137),
        ("uniform", 32, 128, 4096, 7168, 127, 209),
        ("masked", 32, 20, 4096, 7168, 20, 198),
    ):
        floor = grouped.floor_us(grouped.Case(kind, groups, rows, n, k), 4800, 132)
        assert (round(floor["flops"]), round(floor["bytes"])) == (flops, moved)


def test_shapes_of_the_proof_are_cases() -> None:
    names = {case.name for case in grouped.cases(quick=False)}
    assert {grouped.Case(*shape).name for shapes in GROUPED_SHAPES.values() for shape in shapes} <= names


def test_a_line_of_the_summary() -> None:
    ours = {"median_us": 10.0, "tflops": 800.0, "correct": True}
    row = {
        "shape": "s",
        "floor_us": {"flops": 5.0, "bytes": 7.0},
        "candidates": {"ours": ours, "x": {"median_us": 12.0}},
    }
    assert grouped.line(row) == "s 10.0 us, floor 7.0 us, 800 TFLOP/s 1.20x x"
    row["candidates"]["ours"] = {**ours, "correct": False}
    assert grouped.line(row).endswith("WRONG")
    assert grouped.line({"shape": "s", "candidates": {"ours": {"absent": "why"}}}) == "s absent: why"


def test_no_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if absent_reason("cuda") is None:
        pytest.skip("there is a GPU")
    assert grouped.main(["--quick"]) == 1
    assert "no GPU" in capsys.readouterr().out
