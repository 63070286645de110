"""The reward model: how often the judge agrees with what is known to be better."""

from __future__ import annotations

from typing import Any

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.sections.sft import loss_pictures

STAGE = "reward"
TITLE = "Reward model (sections 5.2.1, 5.4.2)"
ASKS = (
    "Trained from the SFT checkpoint on preference pairs that hold a rationale beside the verdict, so that it is harder to please "
    "without being right; and several of its own votes make a steadier judge."
)


def write(run: RunFolder, part: Part) -> None:
    """Agreement by kind of pair, before and after, with intervals; voting; what it says."""
    result = run.results[STAGE]
    before, after = result["before"]["agreement"], result["after"]["agreement"]
    kinds = list(after)
    for kind in kinds:
        near = ", near chance" if after[kind]["near_chance"] else ""
        part.find(
            f"agreement_{kind}", f"judge's agreement on held-out pairs, {kind}{near}", after[kind]["value"]
        )
    part.text(
        f"Trained on {sum(result['pairs'].values())} pairs, each in both orders. Held-out pairs are asked in both orders too; guessing "
        "agrees with half of them. Each kind is counted by itself, for a judge of this size is good at some and guesses at others."
    )

    def row(of: dict[str, Any]) -> tuple[float, float, float]:
        return of["value"], of["low"], of["high"]

    plots.intervals(
        part.folder / "agreement.png",
        "agreement on held-out pairs",
        "share, with 95 % interval",
        kinds,
        {
            "before": [row(before[k]) if k in before else None for k in kinds],
            "after": [row(after[k]) for k in kinds],
        },
        chance=[after[k].get("chance", 0.5) for k in kinds],
    )
    pictures = [
        ("agreement.png", "Agreement of the judge with the better answer, before and after; dotted: guessing")
    ]
    voting = result.get("voting") or {}
    if voting:
        plots.intervals(
            part.folder / "voting.png",
            "one judgement or a majority",
            "share that agrees",
            list(voting),
            {
                "one, sampled": [row(v["single"]) for v in voting.values()],
                "majority": [row(v["voted"]) for v in voting.values()],
            },
        )
        pictures.append(("voting.png", "One sampled judgement against the majority of several"))
    part.pictures([*pictures, *loss_pictures(run, part, STAGE)])
    part.table(
        ["kind", "pairs", "before", "after", "95 % interval", "same in both orders", "for the first place"],
        [
            [
                kind + (" ~" if a["near_chance"] else ""),
                str(a["count"]),
                f"{before[kind]['value']:.3f}" if kind in before else "",
                f"{a['value']:.3f}",
                f"[{a['low']:.3f}, {a['high']:.3f}]",
                f"{a['consistent']:.2f}",
                f"{a['first']:.2f}",
            ]
            for kind, a in after.items()
        ],
    )
    part.text("~ near chance: guessing explains it.")
    for sample in result.get("samples", [])[:6]:
        part.sample(
            f"{sample['kind']}: for the better answer with {sample['probability_of_chosen']:.0%}",
            f"{sample['prompt']}\nbetter: {sample['chosen']}\nworse: {sample['rejected']}",
            sample["rationale"],
        )
