"""Supervised fine-tuning: loss of answers, of each source and of MTP; what the model says before and after."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import Line

STAGE = "sft"
TITLE = "Supervised fine-tuning (section 5.1)"
ASKS = (
    "Two epochs of conversations, cosine from 5e-6 to 1e-6, samples packed into rows without seeing each other, loss on answers only. "
    "The loss of held-out answers must fall."
)


def write(run: RunFolder, part: Part) -> None:
    """Curves and answers."""
    result = run.results[STAGE]
    before, after = result["before"], result["after"]
    falls = after["loss"] < before["loss"]
    part.find("sft_loss_before", "SFT: held-out loss of answers before", before["loss"])
    part.find(
        "sft_loss", "SFT: held-out loss of answers after", after["loss"], f"< {before['loss']:.3f}", falls
    )
    count, rate = sum(result["samples"].values()), run.config["sft"]["schedule"]
    part.text(
        f"{count} conversations ({', '.join(f'{n} {name}' for name, n in result['samples'].items())}) in {result['steps']} steps: the "
        f"loss of held-out answers went from {before['loss']:.3f} to {after['loss']:.3f} nats/token, that of MTP, which drafts in chats "
        f"too, from {before['mtp_loss']:.3f} to {after['mtp_loss']:.3f}. The rate falls from {rate['peak']:g} to {rate['final']:g}."
    )
    part.pictures(loss_pictures(run, part, STAGE))
    for sample in result.get("answers", []):
        title = f"{sample['source']} (wanted: {sample['wanted'][:80]})"
        part.sample(title, sample["question"], f"{sample['after']}   [before: {sample['answer'][:80]}]")


def loss_pictures(run: RunFolder, part: Part, stage: str) -> list[tuple[str, str]]:
    """Training and held-out loss and the rate of a stage that fine-tunes: draws them, and tells what they show."""
    steps, evaluations = run.steps(stage), run.held_out(stage)
    pictures = []
    if steps:
        x = [r["step"] for r in steps]
        curves = [Line("answers", x, [r["loss"] for r in steps], smoothed=True)]
        if steps[0].get("mtp_loss"):
            curves.append(Line("MTP", x, [r["mtp_loss"][0] for r in steps], smoothed=True))
        plots.lines(
            part.folder / f"{stage}_loss.png", "training loss of answers", "step", "nats per token", curves
        )
        pictures.append((f"{stage}_loss.png", "Loss of answers in training; questions do not count"))
    if evaluations:
        at = [row["step"] for row, _ in evaluations]
        sources = evaluations[0][1]["sources"]
        curves = [Line(s, at, [e["sources"][s] for _, e in evaluations], points=True) for s in sources]
        if any(e["mtp_loss"] for _, e in evaluations):
            curves.append(
                Line("MTP, all", at, [e["mtp_loss"] for _, e in evaluations], points=True, style="--")
            )
        plots.lines(
            part.folder / f"{stage}_held_out.png",
            "held-out loss of answers",
            "step",
            "nats per token",
            curves,
        )
        pictures.append((f"{stage}_held_out.png", "Loss of held-out answers of each source"))
    if steps:
        rate = [Line("learning rate", x, [r["lr"] for r in steps])]
        plots.lines(part.folder / f"{stage}_rate.png", "learning rate", "step", "", rate, low=0)
        pictures.append((f"{stage}_rate.png", "Learning rate: a cosine"))
    return pictures
