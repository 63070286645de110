"""Drawing a timeline as the report's figure 5 does: one row per rank, one cell per op, numbers of micro-batches inside.

Colours tell kinds: orange F, green B, turquoise Bi, blue W; paler in DualPipe's second
direction, and from the second pass through the ranks on (the way up in V). A pair is its two cells in one black frame. `text` is for terminals and documents,
`html` stands alone with a tooltip per op, `png` needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..._checks import fail
from .schedule import Kind, Op, Pair, ops
from .simulate import Timeline

COLOURS = {
    Kind.F: ("#f4b183", "#fbe0cd"),
    Kind.B: ("#8cc168", "#cfe6bf"),
    Kind.BI: ("#5fc9c0", "#bfe9e5"),
    Kind.W: ("#8fb4e3", "#d3e2f5"),
}
MEANING = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.BI: "backward for inputs",
    Kind.W: "backward for weights",
}


class Cell(NamedTuple):
    """A rectangle: `op` on `rank` from `start` to `end`."""

    rank: int
    start: float
    end: float
    op: Op
    later: bool  # direction 1, or not the first pass through the ranks


class Frame(NamedTuple):
    """The border of an overlapped pair."""

    rank: int
    start: float
    end: float


def cells(timeline: Timeline) -> tuple[list[Cell], list[Frame]]:
    """Everything that there is to draw. A pair's two cells share its time as F and B would apart."""
    drawn, frames = [], []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            costs = [timeline.costs.of(op) for op in ops(span.action)]
            start = span.start
            for op, cost in zip(ops(span.action), costs, strict=True):
                end = start + (span.end - span.start) * cost / sum(costs)
                drawn.append(Cell(rank, start, end, op, timeline.schedule.chunk(op) > 0))
                start = end
            if isinstance(span.action, Pair):
                frames.append(Frame(rank, span.start, span.end))
    return drawn, frames


def text(timeline: Timeline, columns_per_unit: int = 3) -> str:
    """One line per rank, `columns_per_unit` characters per unit of time.

    F, B, I (for Bi) and W with the micro-batch, in small letters what the other drawings show paler; = is an op that goes
    on, & joins a pair, . is idle.
    """
    width = round(timeline.total * columns_per_unit)
    lines = [["."] * width for _ in range(timeline.schedule.ranks)]
    letters = {Kind.F: "F", Kind.B: "B", Kind.BI: "I", Kind.W: "W"}
    drawn, frames = cells(timeline)
    for cell in drawn:
        start, end = round(cell.start * columns_per_unit), round(cell.end * columns_per_unit)
        letter = letters[cell.op.kind].lower() if cell.later else letters[cell.op.kind]
        label = f"{letter}{cell.op.microbatch}"[: end - start]
        lines[cell.rank][start:end] = label.ljust(end - start - 1, "=").ljust(end - start)
    for frame in frames:
        at = next(c for c in drawn if c.rank == frame.rank and c.start == frame.start)
        lines[frame.rank][max(round(at.end * columns_per_unit) - 1, 0)] = "&"
    return "\n".join(f"rank {rank:<2} |{''.join(line)}|" for rank, line in enumerate(lines)) + "\n"


def html(timelines: Sequence[Timeline]) -> str:
    """A page that needs no other file: each timeline as SVG, with what an op is, and when, under the pointer."""
    body = "\n".join(
        f"<h2>{escape(title(timeline))}</h2>\n<div class='chart'>{svg(timeline)}</div>"
        for timeline in timelines
    )
    swatches = "".join(
        f"<span style='background:{COLOURS[kind][0]}'>{kind}</span> {meaning} &nbsp; "
        for kind, meaning in MEANING.items()
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>pipeline schedules</title><style>"
        "body{font:14px sans-serif;margin:1.5em}h2{font-size:16px}.chart{overflow-x:auto}"
        "p span{padding:2px 8px}text{font:10px sans-serif;text-anchor:middle;pointer-events:none}"
        "rect{stroke:#fff;stroke-width:.6}.pair{fill:none;stroke:#000;stroke-width:1.3;pointer-events:none}"
        f"</style><p>{swatches} paler: direction 1, or a later pass through the ranks; black frame: overlapped; white: idle</p>\n{body}\n</html>\n"
    )


def svg(timeline: Timeline, row: int = 22, width: int = 1400) -> str:
    """One timeline; rows are `row` high, the step is at least `width` wide and an op at least readable."""
    drawn, frames = cells(timeline)
    narrowest = min(cell.end - cell.start for cell in drawn)
    scale = min(max(width / timeline.total, 14 / narrowest), 20000 / timeline.total)
    left, high = 60, row * timeline.schedule.ranks
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{left + scale * timeline.total + 2:.0f}' height='{high + 2}'>"
    ]
    parts += [
        f"<text x='28' y='{row * (rank + 0.68):.1f}'>rank {rank}</text>"
        for rank in range(timeline.schedule.ranks)
    ]
    for cell in drawn:
        x, y, w = left + scale * cell.start, row * cell.rank + 1, scale * (cell.end - cell.start)
        parts.append(
            f"<rect x='{x:.1f}' y='{y}' width='{w:.1f}' height='{row - 2}' fill='{COLOURS[cell.op.kind][cell.later]}'>"
            f"<title>{escape(tooltip(cell))}</title></rect>"
        )
        if w >= 7 * len(str(cell.op.microbatch)):
            parts.append(f"<text x='{x + w / 2:.1f}' y='{y + row * 0.63:.1f}'>{cell.op.microbatch}</text>")
    for frame in frames:
        x, w = left + scale * frame.start, scale * (frame.end - frame.start)
        parts.append(
            f"<rect class='pair' x='{x:.1f}' y='{row * frame.rank + 1}' width='{w:.1f}' height='{row - 2}'/>"
        )
    return "".join(parts) + "</svg>"


def tooltip(cell: Cell) -> str:
    """What an op is and when, in words."""
    way = f", direction {cell.op.direction}" if cell.op.direction else ""
    return (
        f"{MEANING[cell.op.kind]} of micro-batch {cell.op.microbatch}, stage {cell.op.stage}{way}: "
        f"{cell.start:g} to {cell.end:g} on rank {cell.rank}"
    )


def title(timeline: Timeline) -> str:
    """Heading of a chart."""
    schedule = timeline.schedule
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches, "
        f"time {timeline.total:g}, bubble {100 * timeline.bubble_share:.1f} %"
    )


def write_html(timelines: Sequence[Timeline], path: Path) -> None:
    """`html` as a file, whole or not at all."""
    with _published(path) as temporary:
        temporary.write_text(html(timelines), encoding="utf-8")


def write_png(timelines: Sequence[Timeline], path: Path) -> None:
    """One chart under the other; `ArgumentError` where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError:
        fail("png", "needs matplotlib: pip install matplotlib; html needs nothing", path)
    rows = [timeline.schedule.ranks for timeline in timelines]
    longest = max(timeline.total for timeline in timelines)
    figure = Figure(figsize=(15, 0.26 * sum(rows) + 0.9 * len(rows) + 0.5), dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, timeline in zip(panels, timelines, strict=True):
        drawn, frames = cells(timeline)
        for cell in drawn:
            colour = COLOURS[cell.op.kind][cell.later]
            w = cell.end - cell.start
            axis.add_patch(
                Rectangle(
                    (cell.start, cell.rank - 0.45), w, 0.9, facecolor=colour, edgecolor="white", linewidth=0.4
                )
            )
            label = str(cell.op.microbatch)
            if w / longest * 1400 >= 8 * len(label):
                axis.text(cell.start + w / 2, cell.rank, label, ha="center", va="center", fontsize=6.5)
        for frame in frames:
            at, w = (frame.start, frame.rank - 0.45), frame.end - frame.start
            axis.add_patch(Rectangle(at, w, 0.9, fill=False, edgecolor="black", linewidth=0.9))
        axis.set(xlim=(0, longest), ylim=(timeline.schedule.ranks - 0.5, -0.5), ylabel="rank")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title(timeline), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=COLOURS[kind][0], label=meaning) for kind, meaning in MEANING.items()]
    legend.append(Patch(facecolor="none", edgecolor="black", label="overlapped F and B"))
    legend.append(Patch(color=COLOURS[Kind.F][1], label="paler: direction 1, or a later pass"))
    panels[-1].set_xlabel("time")
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    with _published(path) as temporary:
        figure.savefig(temporary, format="png")


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is written; nothing is left of it if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
