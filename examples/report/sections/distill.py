"""Distillation: what became of the expert's answers, and what the student learnt from those that were kept."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.sections.sft import loss_pictures

STAGE = "distill"
TITLE = "Distillation of an expert (section 5.1)"
ASKS = (
    "A domain expert answers under a system prompt that calls for reflection and verification; answers that are wrong, unfinished, badly "
    "written or needlessly long are rejected, and the student is fine-tuned on the rest. The report watches accuracy and length together."
)
OTHER = ("problems", "answers")  # in the table of fates, what is no fate


def write(run: RunFolder, part: Part) -> None:
    """Fates, accuracy and length before and after, curves."""
    result = run.results[STAGE]
    table = result["rejection"]
    fates = {k: v for k, v in table.items() if isinstance(v, int) and k not in OTHER}
    students = {
        name: result[key]
        for name, key in (
            ("before", "before"),
            ("after", "after"),
            ("after, asked to reflect", "asked_to_reflect"),
        )
        if key in result
    }
    teacher = run.config.get(STAGE, {}).get("teacher", "grpo")
    expert = run.results.get(teacher, {}).get("after", {})
    models = {f"student {name}": row for name, row in students.items()}
    if "accuracy" in expert:
        models[f"expert ({teacher})"] = expert
    before, after = result["before"]["accuracy"], result["after"]["accuracy"]
    part.find("distill_accuracy_before", "distillation: student's accuracy before", before)
    part.find("distill_accuracy", "distillation: student's accuracy after", after)
    part.text(
        f"{table['answers']} answers to {table['problems']} problems, {fates.get('kept', 0)} kept. The student's greedy accuracy went from "
        f"{before:.1%} to {after:.1%} in {result['steps']} steps."
    )
    folder = part.folder
    plots.bars(folder / "fates.png", "what became of the expert's answers", "answers", fates, form="{:.0f}")
    plots.bars(
        folder / "distill_accuracy.png",
        "greedy held-out accuracy",
        "share",
        {name: row["accuracy"] for name, row in models.items()},
    )
    pictures = [
        ("fates.png", "What became of the expert's answers"),
        ("distill_accuracy.png", "Accuracy of the student before and after, and of the expert"),
    ]
    lengths = {name: row["length"] for name, row in models.items() if "length" in row}
    if lengths:
        plots.bars(
            folder / "distill_length.png", "length of greedy answers", "tokens", lengths, form="{:.1f}"
        )
        pictures.append(("distill_length.png", "Length of greedy answers"))
    part.pictures([*pictures, *loss_pictures(run, part, STAGE)])
    part.table(
        ["greedy, held out", "accuracy", "length, tokens"],
        [
            [name, f"{r['accuracy']:.3f}", f"{r['length']:.2f}" if "length" in r else ""]
            for name, r in models.items()
        ],
    )
    if "mean_length_kept" in table:
        part.text(
            f"Mean length: {table['mean_length_drawn']:.2f} tokens of all answers drawn, {table['mean_length_kept']:.2f} of those kept."
        )
    for sample in result["after"].get("samples", [])[:3]:
        part.sample(f"wanted: {sample['wanted']}", sample["question"], sample["answer"])
