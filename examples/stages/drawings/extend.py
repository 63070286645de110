"""Pictures of the context extension: perplexity by position, and the needle grid before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.stages.plots import _save, plt

CURVES = {
    "plain": ("plain RoPE beyond its length", "tab:red", "-"),
    "untrained": ("YaRN, no training", "tab:orange", "--"),
    "phase_1": ("after phase 1", "tab:cyan", "-"),
    "phase_2": ("after phase 2", "tab:blue", "-"),
}


def figures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the result of stage `extend` into `folder`: perplexity by position, and the needles if there was room for any."""
    paths = [folder / "extend_perplexity.png"]
    perplexity(paths[0], result)
    if result["needle"]["before"]:
        paths.append(folder / "extend_needle.png")
        needles(paths[1], result)
    return paths


def perplexity(path: Path, result: Mapping[str, Any]) -> None:
    """exp(mean nats) of the same blocks at every distance: thick, of whole blocks; thin, in bins of positions, whose ups and
    downs are those of the blocks' own text. Dotted: the lengths of training."""
    figure, axis = plt.subplots(figsize=(8, 4))
    width, length = result["bin_width"], result["trained_length"]
    for name, (label, color, style) in CURVES.items():
        nats = result["positions"][name]["curve"]
        at = [width * (i + 0.5) for i in range(len(nats))]
        axis.plot(at, [math.exp(v) for v in nats], color=color, linestyle=style, linewidth=0.8, alpha=0.5)
        bins = length // width
        for block in range(len(nats) // bins):
            mean = math.exp(sum(nats[block * bins : (block + 1) * bins]) / bins)
            axis.hlines(
                mean,
                block * length,
                (block + 1) * length,
                color=color,
                linestyle=style,
                linewidth=2.5,
                label=None if block else label,
            )
    lengths = [result["trained_length"], *(phase["sequence_length"] for phase in result["phases"])]
    for length, what in zip(lengths, ("pre-trained", "phase 1", "phase 2"), strict=True):
        axis.axvline(length, color="gray", linestyle=":", linewidth=1)
        axis.annotate(
            what, (length, 0.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="right"
        )
    axis.set(
        title=f"perplexity by position: the same {result['blocks']} blocks with 0, 1, 2 ... blocks before them",
        xlabel="position",
        ylabel="perplexity",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def needles(path: Path, result: Mapping[str, Any]) -> None:
    """Colour: mean log-probability of the right number; text: share found by greedy decoding."""
    grids = {"before (plain RoPE)": result["needle"]["before"], "after": result["needle"]["after"]}
    values = [v for grid in grids.values() for row in grid["log_p"] for v in row]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        columns = [list(column) for column in zip(*grid["log_p"], strict=True)]  # a row per depth
        image = axis.imshow(columns, aspect="auto", vmin=min(values), vmax=max(values), cmap="viridis")
        for column, found in enumerate(grid["accuracy"]):
            for row, share in enumerate(found):
                bright = image.norm(columns[row][column]) > 0.6
                color = "black" if bright else "white"
                axis.text(column, row, f"{share:.0%}", ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(grid["lengths"])), grid["lengths"])
        axis.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]])
        label = ", near chance" if grid["score"]["near_chance"] else ""
        axis.set(title=f"{name}: {grid['score']['value']:.0%} found{label}", xlabel="context, tokens")
        figure.colorbar(image, ax=axis, shrink=0.8, label="log-probability of the number")
    axes[0].set_ylabel("depth of the needle")
    figure.tight_layout()
    _save(figure, path)
