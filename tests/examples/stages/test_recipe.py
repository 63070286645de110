"""The whole recipe on a micro model: every stage runs, is skipped when done, and the report shows what happened."""

import json
from pathlib import Path

import pytest

from examples.run import main
from examples.stages import RECIPE
from examples.stages.plots import gap_percent, smooth

from ..train.conftest import MICRO


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run folder."""
    root = tmp_path_factory.mktemp("recipe") / "run"
    arguments = ["tiny", "--run-dir", str(root), "--threads", "1", *MICRO]
    assert main(arguments) == 0
    return root, arguments


def test_every_stage_is_done_and_done_once(finished, capsys):
    root, arguments = finished
    before = {stage.name: (root / stage.name / "done.json").stat().st_mtime_ns for stage in RECIPE}
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("already done") == len(RECIPE)
    assert before == {stage.name: (root / stage.name / "done.json").stat().st_mtime_ns for stage in RECIPE}


def test_report_has_its_pictures_and_numbers(finished):
    root, _ = finished
    report = root / "report"
    page, markdown = (report / "report.html").read_text(), (report / "report.md").read_text()
    for picture in ("loss.png", "expert_load.png", "fp8_gap.png"):
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in page and picture in markdown
    numbers = json.loads((report / "done.json").read_text())["result"]
    held_out = json.loads((root / "pretrain" / "done.json").read_text())["result"]["held_out"]
    assert numbers["held_out_loss"] == held_out["loss"]
    assert numbers["max_violation"] == max(held_out["max_violation"])
    assert (
        "width=device-width" in page and "MISSED" in page
    )  # 12 steps do not reach the bounds, and the page says so
    for source in ("python", "maths"):
        assert source in page


def test_speculative_output_equals_greedy(finished):
    root, _ = finished
    result = json.loads((root / "generate" / "done.json").read_text())["result"]
    assert result["equals_greedy"] is True
    assert 0 <= result["acceptance"] <= 1 and result["prompts"] > 0


def test_twins_share_the_beginning(finished):
    """Same rows and weights: the first loss of the bias twin is that of the run, to the bit."""
    from examples.train.metrics import read_metrics

    root, _ = finished
    first = {
        s: read_metrics(Path(root) / s / "metrics.jsonl")[0] for s in ("pretrain", "without_bias", "fp8")
    }
    assert first["pretrain"]["loss"] == first["without_bias"]["loss"]
    assert first["fp8"]["loss"] == pytest.approx(first["pretrain"]["loss"], rel=5e-3)
    assert first["without_bias"]["gamma"] == 0 < first["pretrain"]["gamma"]


def test_smoothing_and_gap():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)  # no start-up bias
    assert smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)
    assert gap_percent([2.0, 2.0], [2.01, 2.01]) == pytest.approx([0.5, 0.5])
