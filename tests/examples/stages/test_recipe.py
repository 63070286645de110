"""The whole recipe on a micro model: every stage runs, is skipped when done, and the report shows what happened."""

import json

import pytest

from examples.stages import RECIPE
from examples.train.metrics import read_metrics


def result(root, stage):
    return json.loads((root / stage / "done.json").read_text())["result"]


def test_every_stage_is_done_and_done_once(recipe, command):
    root, _ = recipe
    before = {stage.name: (root / stage.name / "done.json").stat().st_mtime_ns for stage in RECIPE}
    status, said, _ = command(command.arguments(root, ",".join(before)), root)
    assert status == 0 and said.count("already done") == len(RECIPE)
    assert before == {stage.name: (root / stage.name / "done.json").stat().st_mtime_ns for stage in RECIPE}


def test_report_has_every_part_and_the_numbers_of_the_stages(recipe):
    """What stages really leave is what the page looks for."""
    from examples.report.compose import STORY

    root, _ = recipe
    page, markdown = (
        (root / "report" / "report.html").read_text(),
        (root / "report" / "report.md").read_text(),
    )
    assert "cannot be shown" not in page
    done = {stage.name for stage in RECIPE}
    for section in STORY:
        assert (f"## {section.TITLE}" in markdown) == (section.STAGE in done)
    numbers = result(root, "report")
    held_out = result(root, "pretrain")["held_out"]
    assert numbers["held_out_loss"] == held_out["loss"]
    assert numbers["max_violation"] == max(held_out["max_violation"])
    assert numbers["sft_loss"] == result(root, "sft")["after"]["loss"]
    assert numbers["grpo_gain"] == pytest.approx(result(root, "grpo")["gain"])
    assert "MISSED" in page  # some steps do not reach the bounds, and the page says so
    for name in ("python", "maths", "sums"):
        assert name in page


def test_speculative_output_equals_greedy(recipe):
    root, _ = recipe
    found = result(root, "generate")
    assert found["equals_greedy"] is True
    assert 0 <= found["acceptance"] <= 1 and found["prompts"] > 0


def test_twins_share_the_beginning(recipe):
    """Same rows and weights: the first loss of the bias twin is that of the run, to the bit."""
    root, _ = recipe
    first = {s: read_metrics(root / s / "metrics.jsonl")[0] for s in ("pretrain", "without_bias", "fp8")}
    assert first["pretrain"]["loss"] == first["without_bias"]["loss"]
    assert first["fp8"]["loss"] == pytest.approx(first["pretrain"]["loss"], rel=5e-3)
    assert first["without_bias"]["gamma"] == 0 < first["pretrain"]["gamma"]
