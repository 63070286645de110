"""Reinforcement learning: reward, held-out accuracy, and what tells a run that goes wrong."""

from __future__ import annotations

from typing import Any

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import Line

STAGE = "grpo"
TITLE = "Reinforcement learning with GRPO (section 5.2.2)"
ASKS = (
    "Equations 26 to 28: G answers to each question, advantages normalised within the group, a clipped ratio, a penalty on the distance "
    "to the reference. Greedy accuracy on held-out problems must rise by 0.15 over the start."
)
LIFT = 0.15


def write(run: RunFolder, part: Part) -> None:
    """The curves, the lift, answers."""
    result = run.results[STAGE]
    before, after = result["before"], result["after"]
    gain = after["accuracy"] - before["accuracy"]
    part.find("grpo_accuracy_before", "GRPO: greedy held-out accuracy at its start", before["accuracy"])
    part.find("grpo_accuracy", "GRPO: greedy held-out accuracy at its end", after["accuracy"])
    part.find("grpo_gain", "GRPO: lift of greedy held-out accuracy", gain, f">= {LIFT}", gain >= LIFT)
    config = run.config.get(STAGE, {})
    drawn = f"{config['prompts']} questions x {config['group']} answers" if "group" in config else "answers"
    part.text(
        f"{result['steps']} steps of {drawn}: greedy accuracy on {after.get('problems', 'the')} held-out problems went from "
        f"{before['accuracy']:.1%} to {after['accuracy']:.1%} ({gain:+.1%}). Problems of the evaluation are none of those trained on."
    )
    part.pictures(_pictures(run, part))
    rows = []
    for old, new in zip(before.get("samples", []), after.get("samples", []), strict=False):
        rows.append([old["question"], str(old["wanted"]), old["answer"], new["answer"]])
    if rows:
        part.table(["held-out problem", "wanted", "before", "after"], rows)


def _pictures(run: RunFolder, part: Part) -> list[tuple[str, str]]:
    steps, evaluations = run.steps(STAGE), run.held_out(STAGE)
    if not steps:
        return []
    x = [r["step"] for r in steps]

    def curve(name: str, key: str) -> Line:
        return Line(name, x, [r[key] for r in steps], smoothed=True)

    def panel(name: str, title: str, alt: str, curves: list[Line], **more: Any) -> tuple[str, str]:
        plots.lines(part.folder / f"grpo_{name}.png", title, "step", "", curves, **more)
        return f"grpo_{name}.png", alt

    rewards = [curve("mean", "reward"), curve("std within a group", "reward_std")]
    pictures = [
        panel("reward", "reward", "Reward of sampled answers: mean, and spread within a group", rewards)
    ]
    if evaluations:
        at, values = [row["step"] for row, _ in evaluations], [e["accuracy"] for _, e in evaluations]
        pictures.append(
            panel(
                "accuracy",
                "greedy held-out accuracy",
                "Accuracy of greedy answers to held-out problems, with the start and what is demanded",
                [Line("accuracy", at, values, points=True)],
                marks={"start": values[0], f"start + {LIFT}": values[0] + LIFT},
            )
        )
    shares = [
        curve("clipped terms", "clip_fraction"),
        curve("groups without variance", "zero_variance_groups"),
    ]
    pictures += [
        panel("kl", "distance to the reference", "KL divergence from the reference, k3 estimate", [curve("KL", "kl")]),
        panel("entropy", "entropy", "Entropy of the policy per token: 0 is a policy that has stopped to try", [curve("nats per token", "entropy")], low=0),
        panel("shares", "clipping, and groups that teach nothing", "Share of clipped terms; share of groups whose answers are all right or all wrong", shares, low=0),
        panel("length", "length of answers", "Mean length of sampled answers, tokens", [curve("tokens", "length")], low=0),
    ]  # fmt: skip
    return pictures
