"""A counted plan in words: memory, step, throughput, bill; and rankings."""

from __future__ import annotations

from collections.abc import Sequence

from examples.plan.hardware import GIB, rows
from examples.plan.model_costs import totals
from examples.plan.run import Comparison, Result
from examples.plan.search import Search, short


def summary(result: Result, price: float | None = None) -> str:
    """The page that `python -m examples.plan` prints."""
    plan, step, layout, card = result.plan, result.step, result.plan.layout, result.plan.hardware
    dollars = card.price.number if price is None else price
    counts = totals(plan.model, plan.seq_len)
    schedule = "DualPipe" if plan.overlapped else "no pipeline"
    context = f", {plan.context_parallel} GPUs to a sequence" if plan.context_parallel > 1 else ""
    lines = [
        f"{counts.parameters / 1e9:.1f}B parameters, {counts.active_parameters / 1e9:.2f}B per token, {counts.flops_per_token / 1e9:.1f} GFLOP per token at {plan.seq_len} tokens",
        f"{layout.world} x {card.name}: PP {layout.pp} x DP {layout.dp} (EP {layout.ep} on {layout.ep_nodes} node(s), inside DP), {schedule}{context}",
        f"batch {plan.batch} x {plan.seq_len} = {plan.step_tokens / 1e6:.1f}M tokens: M = {plan.micro_batches} micro-batches of {plan.tokens} tokens per pipeline",
        "",
        *_table("memory of the fullest GPU", "GiB", {k: v / GIB for k, v in result.memory.items()}),
        f"{'sum':44}{result.bytes / GIB:10.2f}  of {card.memory.number / GIB:.1f}: "
        + ("fits" if result.fits else "DOES NOT FIT"),
        "",
        *_table("time of a step, on the slowest GPU", "ms", {k: 1e3 * v for k, v in step.terms.items()}),
        f"{'sum':44}{1e3 * step.seconds:10.0f}",
        *(
            f"{'hidden behind it: ' + name:44}{1e3 * value:10.0f}"
            for name, value in step.hidden.items()
            if value
        ),
        "",
        f"{'tokens per second and GPU':44}{result.tokens_per_gpu:10.0f}",
        f"{'model TFLOP/s per GPU':44}{result.flops_per_gpu / 1e12:10.0f}",
        f"{'MFU of the BF16 peak':44}{100 * result.mfu_bf16:9.1f}%  (of the FP8 peak {100 * result.mfu_fp8:.1f} %)",
        f"{'GPU hours per trillion tokens':44}{result.hours_per_trillion:10,.0f}",
        f"{f'days for {result.tokens / 1e12:.4g}T tokens':44}{result.days:10.1f}  ({result.hours / 1e3:,.0f}K GPU hours)",
        f"{f'cost at ${dollars:g} per GPU hour':44}{dollars * result.hours / 1e6:10.3f}  million dollars",
        "MFU: 3 x forward FLOPs of Linears and causal attention of the main model, without recomputation and without MTP.",
    ]
    return "\n".join(lines)


def _table(title: str, unit: str, values: dict[str, float]) -> list[str]:
    digits = 0 if unit == "ms" else 2
    return [f"{title:44}{unit:>10}", *(f"  {name:42}{value:10.{digits}f}" for name, value in values.items())]


def comparison(bill: Sequence[Comparison]) -> str:
    """The report's figures beside the planner's, as Markdown."""
    lines = ["| figure | report | planner | difference |", "|---|---:|---:|---:|"]
    for row in bill:
        form = ",.1f" if row.unit == "days" else ",.0f"
        lines.append(
            f"| {row.what} | {row.reported:{form}} {row.unit} | {row.planned:{form}} | {100 * row.error:+.1f} % |"
        )
    return "\n".join(lines)


def ranking(found: Search, top: int = 10) -> str:
    """The fastest layouts, and what became of the others, as Markdown."""
    lines = [
        "| layout | M | tokens/s/GPU | MFU (BF16) | bubble | all-to-all shown | GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in found.fitting[:top]:
        step = result.step
        bubble = step.terms["pipeline bubble"] / step.seconds
        shown = step.terms["all-to-all, exposed"] / step.seconds
        lines.append(
            f"| {short(result)} | {result.plan.micro_batches} | {result.tokens_per_gpu:,.0f} | {100 * result.mfu_bf16:.1f} % "
            f"| {100 * bubble:.1f} % | {100 * shown:.1f} % | {result.bytes / GIB:.1f} |"
        )
    lines.append("")
    lines.append(
        f"{len(found.fitting)} layouts fit, {len(found.too_large)} are legal but too large, {sum(found.refused.values())} are refused:"
    )
    lines += [f"- {rule}: {n}" for rule, n in found.refused.most_common()]
    return "\n".join(lines)


def assumptions(result: Result) -> str:
    """Every assumption behind a plan with its source, as Markdown."""
    lines = ["| assumption | value | kind | source |", "|---|---:|---|---|"]
    for name, value in rows(result.plan.hardware, result.plan.assumptions):
        lines.append(f"| {name} | {number(value.number)} | {value.kind} | {value.source} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """With a unit letter where it is large."""
    for size, letter in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"
