"""The charts and the command: what is drawn is what was simulated, and what is wrong is one line."""

import itertools
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deepseek_ops import ArgumentError
from deepseek_ops.parallel.dualpipe import Costs, Pair, generate, ops, simulate
from deepseek_ops.parallel.dualpipe.__main__ import main
from deepseek_ops.parallel.dualpipe.chart import cells, svg, text, tooltip, write_png

TIMELINE = simulate(generate("dualpipe", 4, 10), Costs(pair=2.7))


def test_cells_tile_what_each_rank_does():
    drawn, frames = cells(TIMELINE)
    assert len(drawn) == sum(len(ops(action)) for order in TIMELINE.schedule.orders for action in order)
    assert len(frames) == sum(
        isinstance(action, Pair) for order in TIMELINE.schedule.orders for action in order
    )
    for rank in range(4):
        mine = [cell for cell in drawn if cell.rank == rank]
        assert sum(cell.end - cell.start for cell in mine) == pytest.approx(TIMELINE.busy[rank])
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(mine))
    frame = frames[0]
    inside = [c for c in drawn if c.rank == frame.rank and frame.start <= c.start < frame.end]
    assert [c.op.kind for c in inside] == ["F", "B"]
    assert inside[0].end - inside[0].start == pytest.approx(0.9)  # a third of 2.7, as F is of F + B


def test_svg_has_a_rectangle_and_a_tooltip_for_every_op():
    root = ElementTree.fromstring(svg(TIMELINE))
    drawn, frames = cells(TIMELINE)
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [tooltip(cell) for cell in drawn]
    rectangles = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert sum(node.get("class") == "pair" for node in rectangles) == len(frames)
    width = float(root.get("width"))
    assert all(float(node.get("x")) + float(node.get("width")) <= width for node in rectangles)
    assert max(float(node.get("x")) + float(node.get("width")) for node in rectangles) > width - 4


def test_text_of_a_small_step():
    assert text(simulate(generate("1f1b", 2, 2))) == (
        "rank 0  |F0 F1 ......B0=== ...B1=== |\n"  # three characters per unit of time
        "rank 1  |...F0 B0=== F1 B1=== ......|\n"
    )


def test_command_prints_one_schedule_and_writes_both_drawings(tmp_path, capsys):
    page, picture = tmp_path / "out" / "chart.html", tmp_path / "chart.png"
    arguments = ["--pp", "8", "--microbatches", "20", "--schedule", "dualpipe", "--text"]
    assert main([*arguments, "--html", str(page), "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^dualpipe +8 +66 +6 +6 +9\.09 +9 +4$", printed, re.MULTILINE)
    assert re.search(r"^ +3 +60 +6 +9 +4$", printed, re.MULTILINE)
    assert "rank 7  |" in printed
    content = page.read_text()
    assert content.startswith("<!doctype html>") and "http" not in content.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert "backward of micro-batch 3, stage 7, direction 1: 18 to 20 on rank 0" in content
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["chart.html", "chart.png"]


def test_command_compares_all_and_says_what_it_leaves_out(capsys):
    assert (
        main(
            [
                "--pp",
                "4",
                "--microbatches",
                "10",
                "--costs",
                "F=1,B=2,W=1,FB=2.6",
                "--latency",
                "0.1",
                "--blocking",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["dualpipe", "dualpipev", "1f1b", "zb1p"]
    assert lines[5].startswith("interleaved: left out: microbatches: interleaved needs a multiple of 4")


def test_formula_is_left_out_where_there_is_none(capsys):
    assert main(["--pp", "2", "--microbatches", "4", "--schedule", "1f1b,zb1p", "--costs", "F=1/2"]) == 0
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[1:]] == ["-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pp 7 --microbatches 20 --schedule dualpipe", "error: ranks: dualpipe needs an even number"),
        ("--pp 8 --microbatches 20 --schedule gpipe", "error: schedule: must be one of dualpipe, "),
        (
            "--pp 1 --microbatches 1",
            "error: schedule: none of them can be made of these ranks and micro-batches",
        ),
        ("--pp 2 --microbatches 4 --costs F=0", "error: F: must be finite and above 0; got 0.0"),
        ("--pp 2 --microbatches 4 --html /dev/null/x.html", "error: "),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_png_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ArgumentError, match="png: needs matplotlib"):
        write_png([TIMELINE], tmp_path / "chart.png")
    assert not list(tmp_path.iterdir())


def test_the_page_shows_what_the_code_makes():
    page = (Path(__file__).parents[3] / "docs" / "pipeline.md").read_text()
    drawn = [("dualpipe", 4, 8), ("dualpipev", 2, 4), ("1f1b", 4, 8), ("zb1p", 4, 8), ("interleaved", 4, 4)]
    for name, ranks, microbatches in drawn:
        assert text(simulate(generate(name, ranks, microbatches))) in page, name
