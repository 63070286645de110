"""What the routing bias does for the load of the experts: the run beside its twin without it."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import Line

STAGE = "pretrain"
TITLE = "Balance of the experts (sections 2.1.2, 4.5.2)"
ASKS = (
    "Without an auxiliary loss, a bias that is added for the choice of experts alone and moves against each one's load keeps them busy "
    "alike. MaxVio is the load of the busiest expert over the mean, minus 1."
)


def write(run: RunFolder, part: Part) -> None:
    """Loads and MaxVio, with the bias and, where the twin has finished, without."""
    twins = {
        name: stage
        for name, stage in (("with the bias", STAGE), ("without it", "without_bias"))
        if stage in run.results and run.results[stage]["held_out"]["max_violation"]
    }
    if not twins:
        part.text("This model has no routed experts.")
        return
    worst = {name: max(run.results[stage]["held_out"]["max_violation"]) for name, stage in twins.items()}
    value = worst["with the bias"]
    part.find("max_violation", "MaxVio on held-out text, with the bias", value, "< 0.5", value < 0.5)
    told = f"On held-out text MaxVio is {value:.2f} with the bias"
    if "without it" in worst:
        value = worst["without it"]
        name = "MaxVio on held-out text, without it"
        part.find("max_violation_without_bias", name, value, "> 1.5", value > 1.5)
        told += f" and {value:.2f} without it; the twin has the same weights at its start and the same rows, and stops earlier"
    part.text(f"{told}. In a heat map each row is a layer; the last is the MTP module.")
    curves = []
    for name, stage in twins.items():
        steps = [r for r in run.steps(stage) if r.get("max_violation")]
        curves.append(
            Line(name, [r["tokens"] for r in steps], [max(r["max_violation"]) for r in steps], True)
        )
    marks = {"0.5": 0.5}
    plots.lines(
        part.folder / "max_violation.png",
        "MaxVio of each batch",
        "tokens",
        "worst layer",
        curves,
        marks=marks,
        low=0,
    )
    pictures = [("max_violation.png", "MaxVio in training, the largest over the layers")]
    loads = {name: run.results[stage]["held_out"]["load"] for name, stage in twins.items()}
    top = max(2.0, *(max(map(max, load)) for load in loads.values()))
    for (name, load), file in zip(loads.items(), ("load.png", "load_without_bias.png"), strict=False):
        plots.heat(
            part.folder / file,
            f"expert load, {name}",
            "expert",
            "MoE layer",
            load,
            "load / mean",
            limits=(0, top),
        )
        pictures.append((file, f"Load of each expert on held-out text, {name}; 1 is even"))
    part.pictures(pictures)
