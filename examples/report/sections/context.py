"""Long context: loss by position and needles, before and after the extension."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import Line

STAGE = "extend"
TITLE = "Long context (section 4.3)"
ASKS = (
    "After pre-training, YaRN on the decoupled key and two short phases of training carry the window to 8 and 32 times its length "
    "(4K to 32K and 128K), and a fact is found at every depth of it. Here: perplexity must stay flat to 4 times the trained length with "
    "YaRN, and must not with plain RoPE."
)
NAMES = {
    "plain": ("plain RoPE", "--"),
    "untrained": ("YaRN, no training", ":"),
    "phase_1": ("after phase 1", "-"),
    "phase_2": ("after phase 2", "-"),
}


def write(run: RunFolder, part: Part) -> None:
    """Perplexity by position, the verdict, the needles."""
    result = run.results[STAGE]
    positions, width = result["positions"], result["bin_width"]
    trained, final = result["trained_length"], result["final_length"]
    last = [name for name in positions if name.startswith("phase")][-1]
    far = final >= 4 * trained
    margin = result["margin"]
    for key, stage, name, bound, ok in (
        (
            "yarn_rise",
            last,
            f"loss at {final} positions over that at {trained}, YaRN, nats",
            f"<= {margin} to 4x",
            True,
        ),
        (
            "plain_rise",
            "plain",
            f"loss at {final} positions over that at {trained}, plain RoPE, nats",
            f"> {margin}",
            False,
        ),
    ):
        rise = positions[stage]["rise"]
        part.find(key, name, rise, bound, far and (rise <= margin) is ok)
    phases = "; ".join(
        f"{p['steps']} steps of {p['batch_size']} x {p['sequence_length']} tokens, loss {p['loss'][0]:.3f} to {p['loss'][1]:.3f}"
        for p in result["phases"]
    )
    part.text(
        f"Trained on {trained} positions, extended to {final} with s = {result['yarn']['factor']:g}: {phases}. The same "
        f"{result['blocks']} blocks of held-out text are predicted at every distance from the beginning, so that a rise comes from the "
        "position alone."
    )
    if result["flat"]["plain"]:
        part.text(
            "Plain RoPE is flat too: a model that has hardly learnt from positions has nothing to lose beyond them, and this run shows "
            "nothing of YaRN."
        )
    bins = trained // width
    curves = []
    for name, found in positions.items():
        label, style = NAMES.get(name, (name, "-"))
        blocks = range(0, len(found["curve"]), bins)
        means = [math.exp(sum(found["curve"][i : i + bins]) / bins) for i in blocks]
        places = [trained * (i + 0.5) for i in range(len(means))]
        curves.append(Line(label, places, means, points=True, style=style))
    lengths = {f"phase {i}": phase["sequence_length"] for i, phase in enumerate(result["phases"], 1)}
    path = part.folder / "positions.png"
    plots.lines(
        path,
        "perplexity by position",
        "position",
        "perplexity",
        curves,
        at={"pre-trained": trained, **lengths},
    )
    alt = "Perplexity of the same blocks of text with none, one, two, ... blocks before them; dotted: lengths of training"
    pictures = [(path.name, alt)]
    pictures += _training(run, part.folder)
    grids = {when: result["needle"][when] for when in ("before", "after") if result["needle"].get(when)}
    pictures += _needles(grids, part.folder)
    part.pictures(pictures)
    part.table(
        ["model", f"loss up to {trained}", f"loss up to {final}", "rise", "standard error", "flat"],
        [
            [
                NAMES.get(name, (name,))[0],
                f"{found['first']:.4f}",
                f"{found['last']:.4f}",
                f"{found['rise']:+.4f}",
                "" if found["standard_error"] is None else f"{found['standard_error']:.4f}",
                "yes" if result["flat"][name] else "no",
            ]
            for name, found in positions.items()
        ],
    )
    for when, grid in grids.items():
        score = grid["score"]
        part.text(
            f"Needles {when}: {score['value']:.1%} of {score['count']} found [{score['low']:.1%}, {score['high']:.1%}]"
            f"{', near chance' if score['near_chance'] else ''}."
        )


def _training(run: RunFolder, folder: Path) -> list[tuple[str, str]]:
    steps = run.steps(STAGE)
    if not steps:
        return []
    loss = Line("next token", [r["step"] for r in steps], [r["loss"] for r in steps], smoothed=True)
    plots.lines(folder / "extend_loss.png", "training loss", "step", "nats per token", [loss])
    return [("extend_loss.png", "Loss of training in both phases")]


def _needles(grids: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    values = [v for grid in grids.values() for row in grid["log_p"] for v in row]
    pictures = []
    for when, grid in grids.items():
        plots.heat(
            folder / f"needles_{when}.png",
            f"needles, {when}",
            "context, tokens",
            "depth",
            [list(column) for column in zip(*grid["log_p"], strict=True)],
            "log-probability of the number",
            columns=grid["lengths"],
            names=[f"{depth:.0%}" for depth in grid["depths"]],
            limits=(min(values), max(values)),
            texts=[[f"{share:.0%}" for share in column] for column in zip(*grid["accuracy"], strict=True)],
        )
        pictures.append(
            (
                f"needles_{when}.png",
                f"A number hidden in a text, {when}: share found, and how probable it was",
            )
        )
    return pictures
