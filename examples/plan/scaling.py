"""docs/scaling.md: what the recipe costs from 8 to 16,384 GPUs, written and drawn by the planner.

    python -m examples.plan.scaling        # writes docs/scaling.md and docs/scaling/*.png; a test compares the page

The page is generated so that it cannot say anything that the planner does not.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from examples.configs import cluster, get_config
from examples.errors import UserError
from examples.plan import page
from examples.plan.hardware import EFFICIENCIES, GIB, Efficiencies, Value, changed, get_hardware, rows
from examples.plan.ledger import measured
from examples.plan.run import Result, the_report
from examples.plan.search import Search, search, short
from examples.plan.simulated import pipeline_seconds
from examples.plan.step import AFTER

FOLDER = Path(__file__).resolve().parents[2] / "docs"
_GPUS = tuple(2**n for n in range(3, 15))


def find(
    name: str,
    card: str,
    gpus: int,
    batch: int,
    assumptions: Efficiencies,
    **fixed: Any,
) -> Search:
    """All layouts of a configuration, at its own sequence length."""
    config, hardware = get_config(name), get_hardware(card)
    return search(
        config.model,
        hardware,
        gpus=gpus,
        seq_len=config.data.seq_len,
        batch=batch,
        tokens=config.train.schedule.total_tokens,
        assumptions=measured(hardware, assumptions),
        **fixed,
    )


def curve(name: str, card: str, batch_per_gpu: float | None, assumptions: Efficiencies) -> list[Result]:
    """The best layout at every size; batch_per_gpu none: the recipe's own batch."""
    full = get_config(name).train.schedule.batch_size.end
    out = []
    for gpus in _GPUS:
        batch = full if batch_per_gpu is None else int(batch_per_gpu * gpus)
        found = find(name, card, gpus, batch, assumptions)
        out += found.fitting[:1]
    return out


def curves(assumptions: Efficiencies = EFFICIENCIES) -> dict[str, list[Result]]:
    """The lines of the picture."""
    per_gpu = get_config("v3_671b").train.schedule.batch_size.end / cluster.GPUS
    return {
        "671B, H800, batch 15,360": curve("v3_671b", "h800", None, assumptions),
        "671B, H800, 7.5 sequences per GPU": curve("v3_671b", "h800", per_gpu, assumptions),
        "671B, H200, batch 15,360": curve("v3_671b", "h200", None, assumptions),
        "16B, H800, batch 4,608": curve("v3_16b", "h800", None, assumptions),
        "16B, H800, 18 sequences per GPU": curve("v3_16b", "h800", 18, assumptions),
    }


def what_ifs(assumptions: Efficiencies = EFFICIENCIES) -> dict[str, Result]:
    """The report's run, and one thing changed at a time, on 2048 GPUs."""
    batch = get_config("v3_671b").train.schedule.batch_size.end
    report = {"pps": (16,), "eps": (64,), "micro_batches": (1,)}

    def one(card: str = "h800", **fixed: Any) -> Result:
        found = find("v3_671b", card, cluster.GPUS, batch, assumptions, **{**report, **fixed})
        return (found.fitting + found.too_large)[0]

    return {
        "the report: H800, PP 16, EP 64": one(),
        "EP 128": one(eps=(128,)),
        "EP 32": one(eps=(32,)),
        "PP 32": one(pps=(32,)),
        "PP 8": one(pps=(8,)),
        "H100: NVLink 320 GB/s": one("h100"),
        "H200": one("h200"),
        "H200, PP 8": one("h200", pps=(8,)),
        "H20": one("h20"),
    }


def sensitivity(assumptions: Efficiencies = EFFICIENCIES) -> list[tuple[str, Value, float]]:
    """Relative change of the hours per trillion tokens when an assumption is 10 % worse, largest first."""
    base = the_report(assumptions)[0].hours_per_trillion
    out = []
    for field in fields(Efficiencies):
        value: Value = getattr(assumptions, field.name)
        lower_is_better = field.name in _COSTS
        worse = replace(value, number=value.number * (1.1 if lower_is_better else 0.9))
        hours = the_report(replace(assumptions, **{field.name: worse}))[0].hours_per_trillion
        out.append((field.name, value, hours / base - 1))
    return sorted(out, key=lambda row: -row[2])


_COSTS = ("overlap_loss", "rank_imbalance", "comm_sms", "runtime_bytes", "fragmentation")


def write(folder: Path = FOLDER) -> str:
    """The page; its pictures go to `folder`/scaling."""
    from examples.plan import plots

    lines, ifs = curves(), what_ifs()
    plots.scaling(folder / "scaling" / "scaling.png", lines)
    hopper = {name: r for name, r in ifs.items() if name != "H20"}  # whose bar is six times as long
    plots.time_terms(folder / "scaling" / "time.png", hopper)
    plots.memory_items(folder / "scaling" / "memory.png", ifs)
    text = render(lines, ifs)
    part = folder / f".scaling.md.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "scaling.md")
    return text


def render(lines: dict[str, list[Result]], ifs: dict[str, Result]) -> str:
    """The text of the page."""
    main, phases, bill = the_report()
    even = the_report(changed(EFFICIENCIES, {"rank_imbalance": 1.0}))[0].hours_per_trillion
    ranked = find("v3_671b", "h800", cluster.GPUS, main.plan.batch, EFFICIENCIES)
    kinds = [value.kind for _, value in rows(main.plan.hardware, measured(main.plan.hardware, EFFICIENCIES))]
    return _PAGE.format(
        even=even,
        even_error=100 * (even / cluster.HOURS_PER_TRILLION - 1),
        simulated=pipeline_seconds(main.plan),
        exposed=pipeline_seconds(main.plan, 1e-3),
        formula=sum(v for name, v in main.step.terms.items() if name not in AFTER),
        measured=f"{kinds.count('measured')} of {len(kinds)} assumptions are measured by this repository",
        bill=page.comparison(bill),
        summary=page.summary(main),
        ranking=page.ranking(ranked, 5),
        what_ifs=_what_if_table(ifs),
        curves="\n\n".join(f"**{name}**\n\n{_curve_table(results)}" for name, results in lines.items()),
        most=_largest(main),
        sensitivity="\n".join(
            f"| {name} | {page.number(value.number)} | {value.kind} | {100 * change:+.2f} % |"
            for name, value, change in sensitivity()
        ),
        context=" and ".join(f"{p.hours / 1e3:.0f}K hours at {p.plan.seq_len // 1024}K" for p in phases),
        assumptions=page.assumptions(main),
    )


def _largest(main: Result) -> int:
    """GPUs that the report's batch can feed: DualPipe needs M >= 2 PP, and M / PP is the sequences per GPU."""
    return main.plan.batch // 2


def _what_if_table(ifs: dict[str, Result]) -> str:
    table = [
        "| plan | tokens/s/GPU | MFU (BF16) | days | million dollars | GiB | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, r in ifs.items():
        fits = "" if r.fits else f"does not fit {r.plan.hardware.memory.number / GIB:.0f}"
        cost = r.hours * r.plan.hardware.price.number / 1e6
        table.append(
            f"| {name} | {r.tokens_per_gpu:,.0f} | {100 * r.mfu_bf16:.1f} % | {r.days:.1f} | {cost:.2f} | {r.bytes / GIB:.1f} | {fits} |"
        )
    return "\n".join(table)


def _curve_table(results: list[Result]) -> str:
    table = [
        "| GPUs | layout | M | tokens/s/GPU | MFU (BF16) | days | GiB |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        table.append(
            f"| {r.plan.layout.world:,} | {short(r)} | {r.plan.micro_batches} | {r.tokens_per_gpu:,.0f} "
            f"| {100 * r.mfu_bf16:.1f} % | {r.days:,.1f} | {r.bytes / GIB:.1f} |"
        )
    return "\n".join(table)


_PAGE = """\
<!-- Generated by `python -m examples.plan.scaling`. Do not edit. -->
# What the recipe costs, from 8 to 16,384 GPUs

On paper: every figure here is counted by [`examples/plan`](../examples/plan), none was measured on a cluster, and {measured}
(`bench/ledger` is read first; it is empty so far). The rest are data sheets, the report, published
measurements of single kernels and transfers, and our judgement; [each stands below](#every-assumption) with its source.
For your own case: `python -m examples.plan 671b --gpus 2048 --hardware h800`, `--best` for all layouts, `--help` for the rest.

## The report's run
{bill}

No factor stands on a total. Two choices were made with a rough total already in sight and deserve suspicion: an uneven load of ranks of 1.1
(with even ranks, as in the trace, it would be {even:,.0f} hours per trillion, {even_error:+.1f} %), and the repeated work of the context
extension, below. Shares of the peaks that say *calibrated* come from one
published trace, of a single pair of chunks of four MoE layers; the head, the MTP module, the pipeline, the optimizer, the uneven load of
ranks and hence every total are predictions. They leave out checkpoints, restarts, data and the smaller batches at the beginning
(at 3,072 sequences, DP 128 leaves 24 micro-batches to a pipeline, fewer than the 2 PP that DualPipe needs: how the report ran them
is not said). The planner is low everywhere, as a count that leaves things out should be.

The context extension ({context}) is counted with every 4K tokens of a sequence on a GPU of their own, since the report does
not say how long sequences were laid out: latents are exchanged, and each GPU makes keys and values of the whole sequence from
them. A first count without that repeated work was 28 % low. Post-training is the report's figure, not a count.

```
{summary}
```

## Layouts of 2048 H800
{ranking}

## One thing changed at a time
{what_ifs}

Batch 15,360 sequences of 4K and 14.8T tokens in all cases. MFU counts no recomputation and no MTP; of the FP8 peak it is half.

![time](scaling/time.png)

![memory](scaling/memory.png)

## From 8 to 16,384 GPUs
The best layout that fits, at every power of two that has one. A step needs two sequences per GPU (M >= 2 PP), so that a batch of 15,360
feeds {most:,} GPUs at most: beyond that the batch must grow, as in the lines with a fixed number of sequences per GPU.

![scaling](scaling/scaling.png)

{curves}

## What it depends on
Hours per trillion tokens of the report's run when one assumption is 10 % worse.

| assumption | value | kind | effect |
|---|---:|---|---:|
{sensitivity}

## Every assumption
For H800; other cards: `python -m examples.plan 671b --hardware h200 --assumptions`. `--assume name=value` changes one.

{assumptions}

## What is not counted
- Stragglers, failures, checkpoints, evaluation, data loading, the network's own contention: a step here is the same every time.
- The share of its peak that a kernel reaches does not depend on shapes or on the card. Small models (16B: hidden size 2048) reach less
  than these shares, a card with little arithmetic for its bandwidth (H20) more; B200 has no kernels here at all.
- The bubble is the report's formula with the chunks of the mean stage of a rank. Played by the event simulator of
  [`deepseek_ops/parallel/dualpipe`](pipeline.md), with each stage's own times, the report's pipeline takes {simulated:.2f} s where the formula
  says {formula:.2f} s; every hop of the pipeline that took an exposed millisecond would make it {exposed:.2f} s.
- Communication that pairs of chunks hide is counted as hidden as long as it is shorter than their computation, with the loss that the
  trace shows; when filling and draining the pipeline it is shown whole.
- Memory is what tensors need plus two per cent: no allocator was asked. Where a sequence is shared by GPUs, keys and values of the whole sequence are
  taken to be made for some heads at a time.
"""


def main() -> int:
    """Write the page."""
    try:
        write()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {FOLDER / 'scaling.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
