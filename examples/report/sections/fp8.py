"""What training in FP8 costs: the run beside its twin."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import BAND, Line, gap_percent, smooth

STAGE = "fp8"
TITLE = "FP8 training (section 3.3)"
ASKS = (
    f"The loss of FP8 training stays within {BAND} % of that in BF16. The twins share weights at the start, rows and schedule, and the "
    "curves are smoothed with 0.9, as in the report's appendix B.1."
)


def write(run: RunFolder, part: Part) -> None:
    """Both curves, and the gap between them."""
    stages = ("pretrain", STAGE)
    sides = [{r["step"]: r for r in run.steps(stage) if r["loss"] is not None} for stage in stages]
    both = sorted(sides[0].keys() & sides[1].keys())
    high, low = ([side[step]["loss"] for step in both] for side in sides)
    tokens = [sides[0][step]["tokens"] for step in both]
    gap = gap_percent(high, low)
    tail = gap[-max(1, len(gap) // 10) :]
    mean = sum(tail) / len(tail)
    held_out = 100 * (
        run.results[STAGE]["held_out"]["loss"] / run.results["pretrain"]["held_out"]["loss"] - 1
    )
    bound = f"within {BAND}"
    name = "FP8 loss gap, mean of the last tenth, percent"
    part.find("fp8_gap_percent", name, mean, bound, abs(mean) < BAND)
    part.find("fp8_gap_percent_last_step", "FP8 loss gap at the last step, percent", gap[-1])
    name = "FP8 held-out gap, percent"
    part.find("fp8_held_out_gap_percent", name, held_out, bound, abs(held_out) < BAND)
    part.text(
        f"Gap of the smoothed curves: {mean:+.3f} % on average over the last tenth of the steps, {gap[-1]:+.3f} % at the very last; of "
        f"the held-out losses {held_out:+.3f} %. One pair of small runs is partly luck; `python -m bench.fp8_gap` trains pairs over "
        "seeds. Single points leave the band early, while the loss falls fast."
    )
    precision = run.results["pretrain"]["precision"].upper()
    plots.lines(
        part.folder / "fp8_loss.png",
        "training loss, smoothed",
        "tokens",
        "nats per token",
        [Line(precision, tokens, smooth(high)), Line("FP8", tokens, smooth(low), style="--")],
    )
    plots.lines(
        part.folder / "fp8_gap.png",
        f"FP8 loss relative to {precision}",
        "tokens",
        "percent",
        [Line("gap", tokens, gap)],
        band=(-BAND, BAND),
        limits=(-1.5, 1.5),
    )
    part.pictures(
        [
            ("fp8_loss.png", "Training loss of both, smoothed"),
            ("fp8_gap.png", f"Relative gap of the smoothed losses; green: the report's {BAND} %"),
        ]
    )
