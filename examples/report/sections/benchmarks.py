"""Every model of the run on the same tasks."""

from __future__ import annotations

from typing import Any

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part

STAGE = "benchmarks"
TITLE = "Benchmarks (sections 4.4, 5.3)"
ASKS = (
    "The report compares base and chat models on knowledge, language, mathematics and code. Its data sets must be downloaded; without "
    "them the tasks are made of held-out text and generated problems, and compare the models of this run. "
    "~ marks a score that guessing explains."
)


def write(run: RunFolder, part: Part) -> None:
    """A table of tasks x models with 95 % intervals, the same as a picture, and what could not be done."""
    result = run.results[STAGE]
    models, rows = result["models"], result["scores"]
    scored = [row for row in rows if "why" not in row]
    names = list(dict.fromkeys(row["name"] for row in scored))
    cells = {(row["name"], row["model"]): row for row in scored}
    shares = [
        name for name in names if all(r.get("unit", "share") == "share" for r in scored if r["name"] == name)
    ]

    def interval(row: dict[str, Any] | None) -> tuple[float, float, float] | None:
        return row and (row["value"], row["low"], row["high"])

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"{'~' if row['near_chance'] else ''}{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

    if shares:
        first = {name: next(r for r in scored if r["name"] == name) for name in shares}
        plots.intervals(
            part.folder / "benchmarks.png",
            "right answers, each with its 95 % interval",
            "share",
            shares,
            {model: [interval(cells.get((name, model))) for name in shares] for model in models},
            chance=[first[name].get("chance", 0.0) for name in shares],
        )
        part.pictures([("benchmarks.png", "Scores of every model with 95 % intervals; dotted: guessing")])
    table = []
    for name in names:
        some = next(r for r in scored if r["name"] == name)
        unit = "" if some.get("unit", "share") == "share" else f", {some['unit']}"
        chance = f"{some['chance']:.3f}" if some.get("chance") else ""
        table.append([name + unit, str(some["count"]), chance, *(cell(cells.get((name, m))) for m in models)])
    part.table(["task", "items", "chance", *models], table)
    for why in dict.fromkeys(f"{row['name']}: {row['why']}" for row in rows if "why" in row):
        part.text(f"Not done: {why}.")
    if result.get("absent"):
        part.text(f"Stages that had not run: {', '.join(result['absent'])}.")
    asked = [r for r in scored if isinstance(r.get("samples"), list) and r["model"] == models[-1]]
    for row in asked[:3]:
        for sample in row["samples"][:2]:
            part.sample(
                f"{row['name']}, {row['model']} (wanted: {sample['answer']})",
                sample["question"],
                sample["said"],
            )
