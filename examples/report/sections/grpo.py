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

    def curve(name: str, key: str) -> Line:
        """Of the steps that measured it."""
        some = [r for r in steps if r.get(key) is not None]
        return Line(name, [r["step"] for r in some], [r[key] for r in some], smoothed=True)

    def panel(name: str, title: str, alt: str, curves: list[Line], **more: Any) -> None:
        if curves := [line for line in curves if line.x]:
            plots.lines(part.folder / f"grpo_{name}.png", title, "step", "", curves, **more)
            pictures.append((f"grpo_{name}.png", alt))

    pictures: list[tuple[str, str]] = []
    rewards = [curve("mean", "reward"), curve("std within a group", "reward_std")]
    panel("reward", "reward", "Reward of sampled answers: mean, and spread within a group", rewards)
    if evaluations:
        at, values = [row["step"] for row, _ in evaluations], [e["accuracy"] for _, e in evaluations]
        alt = "Accuracy of greedy answers to held-out problems, with the start and what is demanded"
        marks = {"start": values[0], f"start + {LIFT}": values[0] + LIFT}
        panel(
            "accuracy",
            "greedy held-out accuracy",
            alt,
            [Line("accuracy", at, values, points=True)],
            marks=marks,
        )
    alt = "KL divergence from the reference, k3 estimate"
    panel("kl", "distance to the reference", alt, [curve("KL", "kl")])
    alt = "Entropy of the policy per token: 0 is a policy that has stopped to try"
    panel("entropy", "entropy", alt, [curve("nats per token", "entropy")], low=0)
    alt = "Share of clipped terms; share of groups whose answers are all rewarded alike, which teach nothing"
    shares = [
        curve("clipped terms", "clip_fraction"),
        curve("groups without variance", "zero_variance_groups"),
    ]
    panel("shares", "clipping, and groups that teach nothing", alt, shares, low=0)
    alt = "Mean length of sampled answers, tokens"
    panel("length", "length of answers", alt, [curve("tokens", "length")], low=0)
    return pictures
