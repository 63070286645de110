"""The planner's pictures: each function draws one PNG from counted plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from examples.plan.hardware import GIB
from examples.plan.run import Result


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _stacked(axis: Any, bars: Mapping[str, Mapping[str, float]]) -> None:
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    for row, bar in enumerate(bars.values()):
        left = 0.0
        for name, value in bar.items():
            axis.barh(row, value, left=left, height=0.6, color=colors[names.index(name) % 20])
            left += value
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    handles = [Rectangle((0, 0), 1, 1, color=colors[i % 20]) for i in range(len(names))]
    axis.legend(handles, names, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axis.grid(axis="x", alpha=0.3)


def time_terms(path: Path, results: Mapping[str, Result]) -> None:
    """Stacked bars: microseconds per token and GPU, so that plans of different batches compare."""
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.5 * len(results)))
    bars = {}
    for name, result in results.items():
        per_gpu = result.plan.step_tokens / result.plan.layout.world
        bars[name] = {term: 1e6 * value / per_gpu for term, value in result.step.terms.items()}
    _stacked(axis, bars)
    axis.set(title="time of a token on one GPU", xlabel="microseconds")
    _save(figure, path)


def memory_items(path: Path, results: Mapping[str, Result]) -> None:
    """Stacked bars: GiB of the fullest GPU, and what the card has."""
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.5 * len(results)))
    _stacked(axis, {name: {k: v / GIB for k, v in r.memory.items()} for name, r in results.items()})
    for row, result in enumerate(results.values()):
        limit = result.plan.hardware.memory.number / GIB
        axis.plot([limit, limit], [row - 0.4, row + 0.4], color="black", linewidth=2)
    axis.set(title="memory of the fullest GPU (black: what the card has)", xlabel="GiB")
    _save(figure, path)


def scaling(path: Path, curves: Mapping[str, Sequence[Result]]) -> None:
    """Tokens per second and GPU, and days for the whole run, over the number of GPUs."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, results in curves.items():
        gpus = [result.plan.layout.world for result in results]
        ideal = results[0].tokens_per_gpu
        axes[0].plot(
            gpus, [100 * r.tokens_per_gpu / ideal for r in results], marker="o", markersize=3, label=name
        )
        axes[1].plot(gpus, [r.days for r in results], marker="o", markersize=3, label=name)
    axes[0].set(title="tokens/s/GPU, % of the smallest that fits", xlabel="GPUs", xscale="log", ylim=(0, 110))
    axes[1].set(title="days of the whole run", xlabel="GPUs", xscale="log", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _save(figure, path)
