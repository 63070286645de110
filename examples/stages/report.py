"""One page about the run, made from what the stages wrote: report.md, report.html (readable on a phone), pictures.

It reports only stages that have finished, so that it can be made again at any time, and it says which numbers miss the
report's or our own bounds.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from examples.stages import plots
from examples.stages.stage import Context, read_done
from examples.train.metrics import read_metrics


def run(context: Context) -> dict[str, Any]:
    """Draw and write; returns the headline numbers."""
    page = Page(context.folder, f"DeepSeek-V3 recipe, configuration {context.config.name!r}")
    stages = ("tokenize", "pretrain", "without_bias", "fp8", "evaluate", "generate")
    done = {stage: read_done(context.root, stage) for stage in stages}
    results = {stage: record["result"] for stage, record in done.items() if record}
    curves = {
        stage: read_metrics(context.root / stage / "metrics.jsonl")
        for stage in ("pretrain", "without_bias", "fp8")
        if stage in results
    }
    numbers = _headline(results, curves)
    page.table(["", "value", "bound", ""], [_bound_row(*row) for row in _bounds(numbers)])
    _corpus(page, results)
    _losses(page, results, curves)
    _balance(page, results, curves)
    _fp8(page, curves, numbers, results["pretrain"]["precision"].upper())
    _generation(page, results)
    page.heading("Cost")
    rows = [[s, f"{r['seconds']:.0f}", f"{r['peak_memory_mib']:.0f}"] for s, r in done.items() if r]
    page.table(["stage", "seconds", "peak memory of the process, MiB"], rows)
    page.text("Every value of the configuration is in config.json of the run folder.")
    page.write()
    print(f"  {page.folder / 'report.md'}", flush=True)
    for name, value in numbers.items():
        print(f"  {name:32} {value:.4g}", flush=True)
    return numbers


# --- numbers -------------------------------------------------------------------------------------------------------


def _headline(results: dict[str, Any], curves: dict[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    main = results["pretrain"]["held_out"]
    numbers["held_out_loss"] = main["loss"]
    numbers["held_out_bits_per_byte"] = main["bits_per_byte"]
    if main["max_violation"]:
        numbers["max_violation"] = max(main["max_violation"])
    if "without_bias" in results:
        numbers["max_violation_without_bias"] = max(results["without_bias"]["held_out"]["max_violation"])
    if "fp8" in curves:
        high, low = _common(curves["pretrain"], curves["fp8"])
        gap = plots.gap_percent(high, low)
        tail = gap[-max(1, len(gap) // 10) :]
        numbers["fp8_gap_percent"] = sum(tail) / len(tail)
        numbers["fp8_gap_percent_last_step"] = gap[-1]
        fp8 = results["fp8"]["held_out"]["loss"]
        numbers["fp8_held_out_gap_percent"] = 100 * (fp8 / main["loss"] - 1)
    if "acceptance" in results.get("generate", {}):
        numbers["mtp_acceptance"] = results["generate"]["acceptance"]
        numbers["speculative_equals_greedy"] = float(results["generate"]["equals_greedy"])
    return numbers


def _bounds(n: dict[str, float]) -> list[tuple[str, float | None, str, bool]]:
    rows = [
        (
            "held-out loss of the mixture, nats/token",
            n["held_out_loss"],
            "<= 3.5 (tiny)",
            n["held_out_loss"] <= 3.5,
        )
    ]

    def add(name: str, key: str, bound: str, ok: Any) -> None:
        if key in n:
            rows.append((name, n[key], bound, bool(ok(n[key]))))

    add("MaxVio on the held-out mixture, with the bias", "max_violation", "< 0.5", lambda v: v < 0.5)
    add(
        "MaxVio on the held-out mixture, without it",
        "max_violation_without_bias",
        "> 1.5",
        lambda v: v > 1.5,
    )
    add(
        "FP8 loss gap, EMA 0.9, mean of the last tenth, percent",
        "fp8_gap_percent",
        "< 0.25",
        lambda v: abs(v) < plots.BAND,
    )
    add("FP8 held-out gap, percent", "fp8_held_out_gap_percent", "< 0.25", lambda v: abs(v) < plots.BAND)
    add("MTP acceptance", "mtp_acceptance", "> 0.6 (tiny)", lambda v: v > 0.6)
    add("speculative equals greedy", "speculative_equals_greedy", "1", lambda v: v == 1)
    return rows


def _bound_row(name: str, value: float, bound: str, ok: bool) -> list[str]:
    return [name, f"{value:.4g}", bound, "ok" if ok else "MISSED"]


def _common(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Training losses of two runs at the steps that both have."""
    left, right = ({r["step"]: r["loss"] for r in rows if "loss" in r} for rows in (a, b))
    steps = sorted(left.keys() & right.keys())
    return [left[s] for s in steps], [right[s] for s in steps]


# --- sections ------------------------------------------------------------------------------------------------------


def _corpus(page: Page, results: dict[str, Any]) -> None:
    if "tokenize" not in results:
        return
    page.heading("Text")
    rows = [
        [
            r["source"],
            str(r["documents"]),
            f"{r['bytes'] / 1000000.0:.2f}",
            str(r["tokens"]),
            f"{r['bytes_per_token']:.2f}",
            r["licence"],
            f"{r['package']} {r['version'] or ''}".strip(),
        ]
        for r in results["tokenize"]["sources"]
    ]
    page.table(["source", "documents", "MB", "tokens", "bytes/token", "licence", "package"], rows)


def _losses(page: Page, results: dict[str, Any], curves: dict[str, Any]) -> None:
    page.heading("Loss")
    steps = [r for r in curves["pretrain"] if "loss" in r]
    points = [r for r in curves["pretrain"] if "held_out" in r]
    held_out = {
        source: ([p["tokens"] for p in points], [p["held_out"]["sources"][source]["loss"] for p in points])
        for source in (points[0]["held_out"]["sources"] if points else ())
    }
    plots.loss_curves(
        page.folder / "loss.png",
        [r["tokens"] for r in steps],
        [r["loss"] for r in steps],
        [sum(r["mtp_loss"]) / max(1, len(r["mtp_loss"])) for r in steps],
        held_out,
    )
    page.picture("loss.png", "Training and held-out loss")
    if "evaluate" in results:
        trained, average = results["evaluate"]["trained"], results["evaluate"]["ema"]
        rows = [
            [
                s,
                f"{v['loss']:.3f}",
                f"{v['bits_per_byte']:.3f}",
                f"{average['sources'][s]['bits_per_byte']:.3f}",
            ]
            for s, v in trained["sources"].items()
        ]
        rows.append(
            [
                "all",
                f"{trained['loss']:.3f}",
                f"{trained['bits_per_byte']:.3f}",
                f"{average['bits_per_byte']:.3f}",
            ]
        )
        page.table(["held-out source", "nats/token", "bits/byte", "bits/byte of the EMA"], rows)


def _balance(page: Page, results: dict[str, Any], curves: dict[str, Any]) -> None:
    loads = {"with the bias": results["pretrain"]["held_out"]["load"]}
    if not loads["with the bias"]:
        return
    page.heading("Expert load")
    names = {"pretrain": "with the bias"}
    if "without_bias" in results:
        names["without_bias"] = "without it"
        loads["without it"] = results["without_bias"]["held_out"]["load"]
    violations = {}
    for stage, name in names.items():
        steps = [r for r in curves[stage] if "loss" in r]
        violations[name] = ([r["tokens"] for r in steps], [max(r["max_violation"]) for r in steps])
    plots.expert_load(page.folder / "expert_load.png", loads, violations)
    page.picture("expert_load.png", "Expert load on held-out text and MaxVio in training")
    page.text(
        "MaxVio is the largest over the layers (the last row of a heat map is the MTP module), in training of one batch."
    )


def _fp8(page: Page, curves: dict[str, Any], numbers: dict[str, float], high_name: str) -> None:
    if "fp8" not in curves:
        return
    page.heading("FP8 training")
    high, low = _common(curves["pretrain"], curves["fp8"])
    tokens = [r["tokens"] for r in curves["fp8"] if "loss" in r][: len(high)]
    plots.fp8_gap(page.folder / "fp8_gap.png", tokens, high, low, high_name)
    page.picture("fp8_gap.png", "FP8 against the high-precision run: same weights, same rows")
    page.text(
        f"Gap of the smoothed curves: {numbers['fp8_gap_percent']:+.3f} % on average over the last tenth of the steps, "
        f"{numbers['fp8_gap_percent_last_step']:+.3f} % at the very last; of the held-out losses "
        f"{numbers['fp8_held_out_gap_percent']:+.3f} %. Seed noise at this size is about "
        "0.6 %, so the twins share their seed; single points leave the band early, while the loss falls fast."
    )


def _generation(page: Page, results: dict[str, Any]) -> None:
    if "generate" not in results:
        return
    r = results["generate"]
    page.heading("Generation")
    if "acceptance" in r:
        rows = [[source, f"{value:.1%}"] for source, value in r["acceptance_by_source"].items()]
        page.table(["source", "MTP drafts accepted"], [*rows, ["all", f"{r['acceptance']:.1%}"]])
        page.text(
            f"{r['new_tokens']} tokens for {r['prompts']} prompts; {r['tokens_per_pass']:.2f} tokens a pass with drafts "
            f"instead of 1 ({r['plain_tokens_per_second']:.0f} and "
            f"{r['speculative_tokens_per_second']:.0f} tokens/s on this machine)."
        )
    page.text(
        "Samples at temperature 0.8; at this size the text has the form of its source and little sense:"
    )
    for sample in r["samples"]:
        page.sample(sample["source"], sample["prompt"], sample["text"])


# --- the page ------------------------------------------------------------------------------------------------------


class Page:
    """Markdown and HTML, written together."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self._md, self._html = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section."""
        self._md.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._md.append(text)
        self._html.append(f"<p>{html.escape(text)}</p>")

    def table(self, head: list[str], rows: list[list[str]]) -> None:
        """A table of strings."""
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        self._md.append("\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]))
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        top = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        self._html.append(f"<div class=wide><table><tr>{top}</tr>{cells}</table></div>")

    def picture(self, name: str, caption: str) -> None:
        """A PNG of this folder."""
        self._md.append(f"![{caption}]({name})")
        self._html.append(f'<a href="{name}"><img src="{name}" alt="{html.escape(caption)}"></a>')

    def sample(self, source: str, prompt: str, text: str) -> None:
        """Prompt and continuation."""
        shown = prompt[-200:].replace("```", "'''")
        self._md.append(f"**{source}**\n\n```\n{shown} >>> {text.replace('```', chr(39) * 3)}\n```")
        self._html.append(
            f"<h3>{source}</h3><pre>{html.escape(prompt[-200:])}<b>{html.escape(text)}</b></pre>"
        )

    def write(self) -> None:
        """report.md and report.html."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "report.md").write_text("\n\n".join(self._md) + "\n")
        style = (
            "body{font:16px/1.5 sans-serif;max-width:60rem;margin:auto;padding:1rem;color:#222;background:#fff}"
            "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;"
            "text-align:left}.wide{overflow-x:auto}pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem}"
            "pre b{color:#06c;font-weight:normal}"
        )
        head = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style>'
        )
        (self.folder / "report.html").write_text(head + "".join(self._html) + "</html>\n")
