"""Loss of pre-training, of MTP, and on held-out text."""

from __future__ import annotations

from examples.report import plots
from examples.report.folder import RunFolder
from examples.report.page import Part
from examples.report.plots import Line

STAGE = "pretrain"
TITLE = "Pre-training (section 4.2)"
ASKS = (
    "AdamW with a warm-up, a constant rate, a cosine and two low final rates; batches that grow; Multi-Token Prediction with a weight "
    "that falls from 0.3 to 0.1. The report saw no irrecoverable loss spike and never rolled back."
)
WANTED = 3.5  # nats per token of the mixture, at the size of `tiny`


def write(run: RunFolder, part: Part) -> None:
    """The curves, the rate, the losses of each source."""
    result, folder = run.results[STAGE], part.folder
    loss = result["held_out"]["loss"]
    bound = f"<= {WANTED} (tiny)" if run.config["name"] == "tiny" else ""
    part.find("held_out_loss", "held-out loss of the mixture, nats/token", loss, bound, loss <= WANTED)
    part.find("held_out_bits_per_byte", "held-out bits per byte", result["held_out"]["bits_per_byte"])
    steps, evaluations = run.steps(STAGE), run.held_out(STAGE)
    skipped = sum(not r.get("updated", True) for r in steps)
    part.text(
        f"{result['parameters'] / 1e6:.2f}M parameters and {result['mtp_parameters'] / 1e6:.2f}M of MTP in "
        f"{result['precision']}; {result['step']} steps, {result['tokens'] / 1e6:.2f}M tokens. Held-out loss {loss:.3f} nats/token. "
        + (f"{skipped} updates were skipped as spikes." if skipped else "No step was skipped.")
    )
    if steps:
        tokens = [r["tokens"] for r in steps]
        curves = [Line("next token", tokens, [r["loss"] for r in steps], smoothed=True)]
        if steps[0]["mtp_loss"]:
            mean = [sum(r["mtp_loss"]) / len(r["mtp_loss"]) for r in steps]
            curves.append(Line("token after it (MTP)", tokens, mean, smoothed=True))
        plots.lines(folder / "loss.png", "training loss", "tokens", "nats per token", curves)
        rate = [Line("learning rate", tokens, [r["lr"] for r in steps])]
        plots.lines(folder / "rate.png", "learning rate", "tokens", "", rate, low=0)
        pictures = [("loss.png", "Loss of training: pale every step, strong its moving average")]
        if evaluations:
            at = [row["tokens"] for row, _ in evaluations]
            plots.lines(
                folder / "held_out.png",
                "held-out loss",
                "tokens",
                "nats per token",
                [
                    Line(name, at, [e["sources"][name]["loss"] for _, e in evaluations], points=True)
                    for name in evaluations[0][1]["sources"]
                ],
            )
            pictures.append(("held_out.png", "Held-out loss of each source"))
        part.pictures([*pictures, ("rate.png", "Learning rate over the tokens of training")])
    if "evaluate" in run.results:
        trained, average = run.results["evaluate"]["trained"], run.results["evaluate"]["ema"]
        pairs = [
            *((s, v, average["sources"][s]) for s, v in trained["sources"].items()),
            ("all", trained, average),
        ]
        rows = [
            [name, f"{t['loss']:.3f}", f"{t['bits_per_byte']:.3f}", f"{a['bits_per_byte']:.3f}"]
            for name, t, a in pairs
        ]
        part.table(["held-out source", "nats/token", "bits/byte", "bits/byte of the EMA"], rows)
