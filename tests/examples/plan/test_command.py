"""The command line: answers, refusals that name the rule and the nearest legal layout, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.plan.__main__ import main, parse_tokens
from examples.plan.scaling import FOLDER


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["671b", "--gpus", "2048", "--hardware", "h800", "--report", "--assumptions"]) == 0
    out = capsys.readouterr().out
    for text in (
        "671.0B parameters, 37.55B per token",
        "PP 16 x DP 128 (EP 64 on 8 node(s)",
        "M = 120 micro-batches of 4096 tokens",
        "fits",
        "pipeline bubble",
        "MFU of the BF16 peak",
        "| in total | 2,788,000 H800 hours |",
        "| fp8_dense | 0.535 | calibrated |",
    ):
        assert text in out, text


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ("671b --pp 16 --ep 48", ["ep: must divide dp = world / pp = 128", "nearest that fits: world 2048, pp 16, ep 64"]),
        ("671b --pp 12", ["pp: must divide the number of ranks (2048); got 12", "nearest that fits"]),
        ("671b --pp 8 --ep 64", ["memory: must fit the card", "98.6 GiB of 79.1", "nearest that fits: PP 16 x DP 128, EP 64"]),
        ("671b --pp 16 --ep 64 --batch 15361", ["--batch: must be a multiple of 128", "nearest 15360"]),
        ("671b --pp 16 --ep 64 --batch 2048", ["micro_batches: must be at least 32 for dualpipe with pp = 16; got 16"]),
        ("671b --pp 16 --ep 64 --microbatches 33", ["micro_batches: must be even for dualpipe"]),
        ("671b --gpus 64", ["memory: no layout fits; the least is"]),
        ("671b --gpus 16384", ["two sequences per GPU", "--batch 61440"]),
        ("671b --hardware a100", ["--hardware: must be one of h800, h100, h200, h20, b200; got 'a100'"]),
        ("670b", ["config: must be one of", "got '670b'"]),
        ("671b --gpus 0", ["--gpus: must be at least 1; got 0"]),
        ("671b --dp 100", ["--dp: must divide --gpus = 2048; got 100"]),
        ("671b --dp 64 --pp 16", ["--dp: must be gpus / pp = 2048 / 16; got 64"]),
        ("671b --tokens many", ["--tokens: must be a number such as 14.8T or 500B; got 'many'"]),
        ("671b --assume magic=2", ["--assume: must be one of", "got 'magic'"]),
        ("671b --assume fp8_dense", ["--assume: must be NAME=NUMBER"]),
        ("671b --batch 1 --microbatches 2", ["--batch: must not be given together with --microbatches"]),
        ("671b --best 0", ["--best: must be at least 1; got 0"]),
        ("671b --context-parallel 3", ["--context-parallel"]),
        ("671b model.hidden_size=x", ["model.hidden_size"]),
    ],
)  # fmt: skip
def test_refused(arguments: str, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for text in texts:
        assert text in captured.err, captured.err


def test_what_ifs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A small model on one node, ranked and drawn; fewer tokens cost less in proportion."""
    assert (
        main(f"16b --gpus 8 --hardware h200 --best 3 --micro-batch 1 --out {tmp_path / 'new'}".split()) == 0
    )
    assert "| layout | M |" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["memory.png", "plan.md", "time.png"]
    assert (
        main(
            [
                "16b",
                "--gpus",
                "8",
                "--pp",
                "2",
                "--ep",
                "4",
                "--batch",
                "512",
                "--tokens",
                "1T",
                "--price",
                "7",
            ]
        )
        == 0
    )
    whole = capsys.readouterr().out
    assert (
        main(
            [
                "16b",
                "--gpus",
                "8",
                "--pp",
                "2",
                "--ep",
                "4",
                "--batch",
                "512",
                "--tokens",
                "500B",
                "--price",
                "7",
            ]
        )
        == 0
    )
    half = capsys.readouterr().out

    def dollars(text: str) -> float:
        return float(next(line for line in text.splitlines() if line.startswith("cost at $7")).split()[6])

    assert dollars(whole) == pytest.approx(2 * dollars(half), rel=0.05)


def test_an_assumption_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*extra: str) -> int:
        assert main(["671b", *extra]) == 0
        out = capsys.readouterr().out
        return int(
            next(line for line in out.splitlines() if line.startswith("tokens per second")).split()[-1]
        )

    assert tokens("--assume", "fp8_dense=0.3") < tokens() < tokens("--assume", "rank_imbalance=1")


@pytest.mark.parametrize(
    ("text", "tokens"), [("14.8T", 14.8e12), ("500B", 5e11), ("1e12", 1e12), ("3m", 3e6)]
)
def test_tokens(text: str, tokens: float) -> None:
    assert parse_tokens(text) == pytest.approx(tokens)


def test_the_page_is_up_to_date() -> None:
    """docs/scaling.md is what the planner says now; if not: python -m examples.plan.scaling."""
    from examples.plan.scaling import curves, render, what_ifs

    assert (FOLDER / "scaling.md").read_text() == render(curves(), what_ifs())
    for name in ("scaling", "time", "memory"):
        assert 5_000 < (FOLDER / "scaling" / f"{name}.png").stat().st_size < 80_000
