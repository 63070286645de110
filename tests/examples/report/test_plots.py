"""Smoothing, gaps, and panels that can be read."""

import struct

import pytest

from examples.report.plots import Line, bars, gap_percent, heat, intervals, lines, smooth


def test_smoothing_and_gap():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)  # no start-up bias
    assert smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)
    assert gap_percent([2.0, 2.0], [2.01, 2.01]) == pytest.approx([0.5, 0.5])


def test_what_was_not_finite_is_left_out():
    assert Line("a", [1, 2, 3], [1.0, None, 3.0]).finite() == Line("a", [1, 3], [1.0, 3.0])


def size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_panels_fit_a_phone(tmp_path):
    """Not much wider than a phone's pixels, and never a strip."""
    curve = Line("a", [1, 2, 3], [1.0, 2.0, 0.5], smoothed=True)
    paths = [
        lines(
            tmp_path / "lines.png", "t", "x", "y", [curve], marks={"m": 1.0}, at={"p": 2}, band=(0, 1), low=0
        ),
        lines(
            tmp_path / "log.png",
            "t",
            "x",
            "y",
            [Line("a", [1], [1.0], points=True)],
            log=True,
            limits=(0.1, 10),
        ),
        heat(tmp_path / "heat.png", "t", "x", "y", [[1.0, 2.0]], "label", columns=[1, 2], texts=[["a", "b"]]),
        bars(tmp_path / "bars.png", "t", "x", {"a": 1.0}),
        bars(tmp_path / "many.png", "t", "x", {str(i): -float(i) for i in range(12)}),
        intervals(
            tmp_path / "dots.png", "t", "x", ["a", "b"], {"g": [(0.5, 0.4, 0.6), None]}, chance=[0.5, 0]
        ),
    ]
    for path in paths:
        width, height = size(path)
        assert 500 <= width <= 1000 and 200 <= height <= 1.3 * width, path.name
