"""The whole page: a glance at the top, the story in order, what it cost and how to make it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from examples.errors import UserError
from examples.report.folder import RunFolder
from examples.report.page import Finding, Part, write_page
from examples.report.sections import (
    balance,
    benchmarks,
    context,
    distill,
    fp8,
    generation,
    grpo,
    pretraining,
    reward,
    sft,
    text,
)

STORY: tuple[ModuleType, ...] = (
    text,
    pretraining,
    balance,
    fp8,
    context,
    sft,
    reward,
    grpo,
    distill,
    benchmarks,
    generation,
)
# What a section stumbles over when a stage of another version, or one that had nothing to measure, left less than it looks for.
LACKING = (LookupError, TypeError, ValueError, ZeroDivisionError, UserError)


def compose(root: Path, folder: Path, stages: tuple[str, ...]) -> list[Finding]:
    """Write the page about the finished stages of run `root` into `folder`; returns the findings. stages: all, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    run = RunFolder(root, stages)
    told = [section for section in STORY if section.STAGE in run.done]
    parts = [_section(section, run, folder) for section in told]
    findings = [finding for part in parts for finding in part.findings]
    top = Part(folder)
    _glance(top, run, findings)
    top.links([(section.TITLE, _anchor(section)) for section in told] + [("Cost", "cost")])
    title = f"DeepSeek-V3 recipe, configuration {run.config.get('name', '?')!r}"
    write_page(folder, title, [top, *parts, _cost(run, folder)])
    return findings


def _anchor(section: ModuleType) -> str:
    return section.__name__.rpartition(".")[2]


def _section(section: ModuleType, run: RunFolder, folder: Path) -> Part:
    part = Part(folder)
    part.heading(section.TITLE, _anchor(section))
    part.asks(section.ASKS)
    try:
        section.write(run, part)
    except LACKING as error:
        what = f"{type(error).__name__}: {error}"
        part.text(f"The rest cannot be shown: what its stages left lacks something ({what}).")
        print(f"  {section.TITLE}: not all can be shown ({what})", flush=True)
    return part


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (hours + minutes > 0) + [f"{rest} s"]
    return " ".join(parts)


def _glance(top: Part, run: RunFolder, findings: list[Finding]) -> None:
    demanded = [f for f in findings if f.bound]
    missed = [f for f in demanded if not f.ok]
    total = sum(record["seconds"] for record in run.done.values())
    verdict = "all hold" if not missed else f"{len(missed)} missed"
    top.text(f"{len(run.done)} stages in {duration(total)}. {len(demanded)} numbers have a bound: {verdict}.")
    head, rows = ["", "value", "bound", ""], []
    for f in [*missed, *(f for f in demanded if f.ok), *(f for f in findings if not f.bound)]:
        rows.append([f.name, f"{f.value:.4g}", f.bound, f.verdict])
    top.table(head, rows)


def _cost(run: RunFolder, folder: Path) -> Part:
    """Time and memory of each stage; code, torch and threads; how to make it again."""
    part = Part(folder)
    part.heading("Cost, and how to make it again", "cost")
    rows, places = [], []
    for stage, record in run.done.items():
        processes = run.begun(stage).get("processes", [])
        seconds = duration(record["seconds"])
        times = "" if len(processes) < 2 else f"the last of {len(processes)} processes"
        rows.append([stage, seconds, f"{record['peak_memory_mib']:.0f}", record.get("output", ""), times])
        places += [process["environment"] for process in processes]
    total = sum(record["seconds"] for record in run.done.values())
    memory = max((record["peak_memory_mib"] for record in run.done.values()), default=0)
    rows.append(["all", duration(total), f"{memory:.0f}", "", ""])
    part.table(["stage", "time", "peak memory, MiB", "digest of the output", ""], rows)
    for place in _different(places):
        commit = place["code"]["commit"][:12] or "no commit"
        dirty = " with changes" if place["code"]["dirty"] else ""
        part.text(
            f"Code {commit}{dirty} (sources {place['code']['tree']}), torch {place['torch']}, Python {place['python']}, "
            f"{place['processor']}, {place['cuda'] or 'no GPU'}, {place['threads']} threads."
        )
    part.text(
        "config.json of the run folder, and stage.json of every stage, hold each value that made them. "
        f"`python -m examples.run --from {shlex.quote(str(run.root / 'STAGE'))} --run-dir NEW` makes a stage again and says "
        "whether it is equal to the bit."
    )
    return part


def _different(places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for place in places:
        if place not in found:
            found.append(place)
    return found
