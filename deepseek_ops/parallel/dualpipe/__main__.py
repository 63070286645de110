"""Time, bubble and memory of pipeline schedules, as a table and drawn.

python -m deepseek_ops.parallel.dualpipe --pp 8 --microbatches 20 --schedule dualpipe --html chart.html
python -m deepseek_ops.parallel.dualpipe --pp 8 --microbatches 24 --schedule all --costs FB=2.6 --latency 0.1
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..._checks import ArgumentError, require
from .chart import text, write_html, write_png
from .costs import Costs, Link, parse_costs
from .formulas import table2
from .generate import NAMES, generate
from .simulate import Timeline, simulate
from .verify import verify


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m deepseek_ops.parallel.dualpipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--pp", type=int, required=True, help="ranks of the pipeline")
    arguments.add_argument(
        "--microbatches", type=int, required=True, help="of one step, both directions together"
    )
    arguments.add_argument(
        "--schedule", default="all", help=f"of {', '.join(NAMES)}; several with commas, or all (default)"
    )
    arguments.add_argument("--chunks", type=int, default=2, help="parts per rank of interleaved (default 2)")
    arguments.add_argument(
        "--costs",
        default="",
        help="F, B, Bi, W, FB (an overlapped pair) of one stage, as F=1,B=2,W=1 (default); F=1/1/2/1 gives one per stage",
    )
    arguments.add_argument(
        "--latency", type=float, default=0.0, help="of a send between two ranks (default 0)"
    )
    arguments.add_argument(
        "--blocking", action="store_true", help="a rank that sends computes nothing meanwhile"
    )
    arguments.add_argument("--text", action="store_true", help="draw in the terminal")
    arguments.add_argument("--html", type=Path, help="draw into this file, which needs no other")
    arguments.add_argument("--png", type=Path, help="draw into this file (needs matplotlib)")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except (ArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        BrokenPipeError
    ):  # the reader of a pipe has gone; the interpreter shall not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    everything = options.schedule == "all"
    names = NAMES if everything else options.schedule.split(",")
    costs, link = parse_costs(options.costs), Link(options.latency, options.blocking)
    timelines, refused = [], []
    for name in names:
        try:
            schedule = generate(name, options.pp, options.microbatches, chunks=options.chunks)
        except ArgumentError as error:
            if not everything:
                raise
            refused.append(f"{name}: left out: {error}")
            continue
        verify(schedule)
        timelines.append(simulate(schedule, costs, link))
    print(table(timelines, costs))
    for line in refused:
        print(line)
    if len(timelines) == 1:
        print("\n" + per_rank(timelines[0]))
    require(
        bool(timelines),
        "schedule",
        "none of them can be made of these ranks and micro-batches",
        options.schedule,
    )
    if options.text:
        for timeline in timelines:
            print("\n" + text(timeline), end="")
    if options.html:
        write_html(timelines, options.html)
        print(f"wrote {options.html}")
    if options.png:
        write_png(timelines, options.png)
        print(f"wrote {options.png}")
    return 0


def table(timelines: Sequence[Timeline], costs: Costs) -> str:
    """One line per schedule. Bubble and peaks are those of the worst rank; a chunk is one stage's of one micro-batch."""
    lines = [
        f"{'schedule':<12}{'stages':>7}{'time':>10}{'bubble':>9}{'formula':>9}{'bubble %':>9}{'peak chunks':>13}{'deferred W':>12}"
    ]
    for timeline in timelines:
        schedule = timeline.schedule
        lines.append(
            f"{schedule.name:<12}{schedule.stages:>7}{timeline.total:>10.6g}{max(timeline.bubble):>9.5g}"
            f"{_formula(timeline, costs):>9}{100 * timeline.bubble_share:>9.2f}"
            f"{max(timeline.peak_chunks):>13}{max(timeline.peak_deferred):>12}"
        )
    return "\n".join(lines)


def per_rank(timeline: Timeline) -> str:
    """One line per rank."""
    lines = [f"{'rank':>4}{'busy':>10}{'bubble':>9}{'peak chunks':>13}{'deferred W':>12}"]
    rows = zip(timeline.busy, timeline.bubble, timeline.peak_chunks, timeline.peak_deferred, strict=True)
    lines += [
        f"{rank:>4}{busy:>10.6g}{bubble:>9.5g}{peak:>13}{deferred:>12}"
        for rank, (busy, bubble, peak, deferred) in enumerate(rows)
    ]
    path = timeline.critical_path
    computing = sum(span.end - span.start for _, span in path)
    hops = sum(before[0] != after[0] for before, after in pairwise(path))
    lines.append(f"critical path: {len(path)} ops of {computing:g}, {hops} sends between ranks")
    return "\n".join(lines)


def _formula(timeline: Timeline, costs: Costs) -> str:
    """Table 2's bubble, in time of this schedule's stages; only numbers that hold for all stages have one."""
    numbers = (costs.forward, costs.backward, costs.weight)
    if not all(isinstance(number, int | float) for number in numbers) or costs.input_gradient is not None:
        return "-"
    f, b, w = (float(number) for number in numbers)  # type: ignore[arg-type]
    pair = f + b if costs.pair is None else costs.pair
    schedule = timeline.schedule
    if schedule.name == "interleaved":  # its stages are parts of the table's
        return f"{(schedule.ranks - 1) * (f + b):.5g}"
    row = table2(schedule.name, schedule.stages, forward=f, backward=b, weight=w, pair=pair)
    return f"{row.bubble:.5g}"


if __name__ == "__main__":
    sys.exit(main())
