"""The pictures of a run: each function draws one panel into one PNG, from numbers alone.

A panel is drawn for the width of a phone: few words, letters that can be read at 360 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

BAND = 0.25  # percent: the report's bound on the relative loss error of FP8 training (section 3.3)
SIZE = (5.2, 3.4)  # inches of a panel
Numbers = Sequence[float]


def smooth(values: Numbers, decay: float = 0.9) -> list[float]:
    """Exponential moving average without start-up bias; the report smooths its FP8 curves with 0.9."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


def gap_percent(high: Numbers, fp8: Numbers) -> list[float]:
    """Relative difference of the smoothed curves in percent, point by point."""
    return [100 * (b / a - 1) for a, b in zip(smooth(high), smooth(fp8), strict=True)]


@dataclass(frozen=True)
class Line:
    """A curve. smoothed: drawn as its moving average, over the pale values; points: with a mark at each value."""

    name: str
    x: Numbers
    y: Sequence[float | None]
    smoothed: bool = False
    points: bool = False
    style: str = "-"

    def finite(self) -> Line:
        """Without what was not finite, which metrics files write as null."""
        pairs = [(a, b) for a, b in zip(self.x, self.y, strict=True) if b is not None]
        return replace(self, x=[a for a, _ in pairs], y=[b for _, b in pairs])


def lines(
    path: Path,
    title: str,
    x: str,
    y: str,
    curves: Sequence[Line],
    *,
    marks: Mapping[str, float] | None = None,
    at: Mapping[str, float] | None = None,
    band: tuple[float, float] | None = None,
    low: float | None = None,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> Path:
    """Curves over one axis. marks: named heights; at: named places; band: a range that is demanded; low: end of the axis."""
    figure, axis = _panel(title, x, y)
    if band:
        axis.axhspan(*band, color="tab:green", alpha=0.15)
    for number, curve in enumerate(c.finite() for c in curves):
        color = f"C{number}"
        if curve.smoothed:
            axis.plot(curve.x, curve.y, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(
            curve.x,
            smooth(curve.y) if curve.smoothed else curve.y,
            color=color,
            linestyle=curve.style,
            marker="o" if curve.points else None,
            markersize=4,
            label=curve.name,
        )
    for number, (name, value) in enumerate((marks or {}).items()):
        axis.axhline(value, color="gray", linestyle=(":", "--", "-.")[number % 3], linewidth=1, label=name)
    for name, place in (at or {}).items():
        axis.axvline(place, color="gray", linestyle=":", linewidth=1)
        where = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right"}
        axis.annotate(name, (place, 0.03), fontsize=8, **where)
    if log:
        axis.set_yscale("log")
    if limits:
        axis.set_ylim(*limits)
    elif low is not None:
        axis.set_ylim(bottom=low)
    axis.legend(fontsize=9, framealpha=0.6)
    return _save(figure, path)


def heat(
    path: Path,
    title: str,
    x: str,
    y: str,
    rows: Sequence[Numbers],
    label: str,
    *,
    columns: Sequence[Any] | None = None,
    names: Sequence[Any] | None = None,
    limits: tuple[float, float] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> Path:
    """A grid of colours, rows from the top; texts: written into its cells."""
    figure, axis = _panel(title, x, y)
    axis.grid(visible=False)
    low, high = limits or (None, None)
    image = axis.imshow(rows, aspect="auto", vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
    for r, cells in enumerate(texts or ()):
        for c, text in enumerate(cells):
            color = "black" if image.norm(rows[r][c]) > 0.6 else "white"
            axis.text(c, r, text, ha="center", va="center", color=color, fontsize=9)
    if columns is not None:
        axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), names)
    figure.colorbar(image, ax=axis, shrink=0.85, label=label)
    return _save(figure, path)


def bars(path: Path, title: str, x: str, values: Mapping[str, float], *, form: str = "{:.3g}") -> Path:
    """Horizontal bars from the top, each with its value."""
    figure, axis = _panel(title, x, "", height=max(1.8, 0.42 * len(values) + 1.1))
    names = list(values)
    drawn = axis.barh(names, [values[name] for name in names], color=[f"C{i}" for i in range(len(names))])
    axis.bar_label(drawn, [form.format(v) for v in values.values()], padding=3, fontsize=9)
    axis.margins(x=0.18)
    if min(values.values()) >= 0:
        axis.set_xlim(left=0)
    axis.invert_yaxis()
    return _save(figure, path)


def intervals(
    path: Path,
    title: str,
    x: str,
    names: Sequence[str],
    groups: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    chance: Sequence[float] | None = None,
) -> Path:
    """For each name a dot with its interval (value, low, high) from every group; a gray tick where guessing would be."""
    height = max(2.2, (0.22 * len(groups) + 0.25) * len(names) + 1.2)
    figure, axis = _panel(title, x, "", height=height)
    for number, (group, values) in enumerate(groups.items()):
        some = [(i, v) for i, v in enumerate(values) if v is not None]
        places = [i + 0.7 * ((number + 0.5) / len(groups) - 0.5) for i, _ in some]
        middle = [v for _, (v, _, _) in some]
        reach = [
            [max(0.0, v - low) for _, (v, low, _) in some],
            [max(0.0, high - v) for _, (v, _, high) in some],
        ]
        axis.errorbar(middle, places, xerr=reach, fmt="o", markersize=4, capsize=2, label=group)
    for i, value in enumerate(chance or ()):
        if value:
            axis.plot([value, value], [i - 0.4, i + 0.4], color="gray", linestyle=":", linewidth=1.2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.legend(fontsize=9, framealpha=0.6)
    return _save(figure, path)


def _panel(title: str, x: str, y: str, *, height: float = SIZE[1]) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(SIZE[0], height))
    axis.set_title(title, fontsize=11)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return figure, axis


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
