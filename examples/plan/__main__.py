"""What would it cost? `python -m examples.plan 671b --gpus 2048 --hardware h800`.

    python -m examples.plan MODEL [--gpus N] [--hardware h800|h100|h200|h20|b200] [--pp N] [--ep N] [--dp N]
                            [--tokens 14.8T] [--seq-len N] [--batch N | --microbatches M] [--micro-batch N]
                            [--context-parallel N] [--price $] [--assume fp8_dense=0.6 ...] [section.key=value ...]
                            [--best [N]] [--assumptions] [--report] [--out DIR]

MODEL is a configuration (671b and 16b for short). Without --pp and --ep the report's layout is taken for the 671B model where it
works, else the fastest that fits. --best ranks all layouts. --report compares with the report's own bill. --out draws.
Exit status: 0 done, 2 a layout or a value that cannot be, with the rule and the nearest that can.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.configs import cluster, get_config, parse_overrides
from examples.errors import UserError
from examples.plan import page
from examples.plan.hardware import EFFICIENCIES, HARDWARE, changed, get_hardware
from examples.plan.ledger import measured
from examples.plan.plan import make_plan
from examples.plan.run import Result, count, the_report
from examples.plan.search import MICRO_BATCHES, Search, nearest, search, short, too_large

_SHORT = {"671b": "v3_671b", "16b": "v3_16b"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(text: str) -> float:
    """14.8T, 500B, 1e12."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        tokens = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except ValueError:
        tokens = 0.0
    if not tokens > 0:
        raise UserError(f"--tokens: must be a number such as 14.8T or 500B; got {text!r}")
    return tokens


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m examples.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("model", help="a configuration: 671b, 16b, small, tiny, ...")
    top.add_argument("overrides", nargs="*", help="section.key=value, as for examples.run")
    top.add_argument("--gpus", type=int, default=cluster.GPUS)
    top.add_argument("--hardware", default=cluster.HARDWARE, help=", ".join(HARDWARE))
    for name in ("pp", "ep", "dp", "seq-len", "batch", "microbatches", "micro-batch"):
        top.add_argument(f"--{name}", type=int)
    top.add_argument("--context-parallel", type=int, default=1)
    top.add_argument("--tokens", help="of the whole run, such as 14.8T")
    top.add_argument("--price", type=float, help="dollars per GPU hour")
    top.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="see --assumptions")
    top.add_argument("--best", type=int, nargs="?", const=10, help="rank all layouts")
    top.add_argument(
        "--assumptions", action="store_true", help="every number about hardware, with its source"
    )
    top.add_argument("--report", action="store_true", help="the report's bill beside the planner's")
    top.add_argument("--out", type=Path, help="folder for plan.md and the pictures")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        print(_run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> str:
    given = _given(options)
    assumptions = given["assumptions"]
    if options.best is not None:
        if options.best < 1:
            raise UserError(f"--best: must be at least 1; got {options.best}")
        found = search(**given, **_asked(options))
        found.best  # noqa: B018 - raises where there is none
        text, result = page.ranking(found, options.best), found.fitting[0]
        drawn = {short(r): r for r in found.fitting[: options.best]}
    else:
        result = _choose(options, given)
        text, drawn = page.summary(result, options.price), {short(result): result}
    if options.report:
        text += f"\n\n{page.comparison(the_report(assumptions)[2])}"
    if options.assumptions:
        text += f"\n\n{page.assumptions(result)}"
    if options.out:
        _write(options.out, text, drawn)
        text += f"\n\nwritten: {options.out / 'plan.md'} and two pictures"
    return text


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but the layout."""
    config = parse_overrides(get_config(_SHORT.get(options.model.lower(), options.model)), options.overrides)
    schedule = config.train.schedule
    seq_len = options.seq_len or schedule.sequence_length
    if options.batch is not None and options.microbatches is not None:
        raise UserError("--batch: must not be given together with --microbatches, which sets it; got both")
    for name in (
        "gpus",
        "seq_len",
        "batch",
        "microbatches",
        "micro_batch",
        "context_parallel",
        "pp",
        "ep",
        "dp",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1; got {value}")
    if options.price is not None and not options.price >= 0:
        raise UserError(f"--price: must not be negative; got {options.price}")
    batch = options.batch
    if batch is None and options.microbatches is None:  # as many tokens per step as the recipe has
        batch = max(1, schedule.batch_size.end * schedule.sequence_length // seq_len)
    model = replace(config.model, max_positions=max(seq_len, config.model.max_positions))
    hardware = get_hardware(options.hardware)
    return {
        "model": model,
        "hardware": hardware,
        "gpus": options.gpus,
        "seq_len": seq_len,
        "batch": batch,
        "per_pipeline": options.microbatches,
        "context_parallel": options.context_parallel,
        "tokens": parse_tokens(options.tokens) if options.tokens else float(schedule.total_tokens),
        "assumptions": changed(measured(hardware, EFFICIENCIES), _changes(options.assume)),
    }


def _changes(texts: list[str]) -> dict[str, float]:
    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--assume: must be NAME=NUMBER; got {text!r}")
    return out


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The part of the layout that the command line fixes."""
    pp = options.pp
    if options.dp is not None:
        if options.gpus % options.dp:
            raise UserError(f"--dp: must divide --gpus = {options.gpus}; got {options.dp}")
        if pp is not None and pp * options.dp != options.gpus:
            raise UserError(f"--dp: must be gpus / pp = {options.gpus} / {pp}; got {options.dp}")
        pp = options.gpus // options.dp
    return {
        "pps": (pp,) if pp else (),
        "eps": (options.ep,) if options.ep else (),
        "micro_batches": (options.micro_batch,) if options.micro_batch else MICRO_BATCHES,
    }


def _choose(options: argparse.Namespace, given: dict[str, Any]) -> Result:
    """The plan that was asked for; `UserError` if it cannot be, with the nearest that can."""
    asked = _asked(options)
    pp, ep = (asked["pps"] or (None,))[0], options.ep
    if pp is None and ep is None and options.model.lower() in ("671b", "v3_671b"):
        report = {"pps": (cluster.PIPELINE_PARALLEL,), "eps": (cluster.EXPERT_PARALLEL,)}
        found = search(**given, **{**asked, **report, "micro_batches": (options.micro_batch or 1,)})
        if found.fitting:
            return found.best
    micro = options.micro_batch or 1
    if pp is None or ep is None:
        found = search(**given, **asked)
        if found.fitting or found.too_large:
            return found.best
        if pp is None and ep is None:
            raise UserError(f"{_why_none(found)}{_other_batch(given)}")
        pp, ep = pp or 1, ep or 1  # refused below, with the rule and the nearest layout
    batch = given["batch"]
    if batch is None:
        batch = options.microbatches * max(1, options.gpus // pp) * micro // options.context_parallel
    fixed = {k: v for k, v in given.items() if k not in ("tokens", "per_pipeline", "batch")}
    result = count(make_plan(**fixed, pp=pp, ep=ep, micro_batch=micro, batch=batch), given["tokens"])
    if not result.fits:
        near = nearest(search(**given), pp, ep)
        advice = f"nearest that fits: {short(near)}" if near else "no layout of these GPUs fits"
        raise UserError(f"memory: must fit the card; {too_large(result)}; {advice}")
    return result


def _why_none(found: Search) -> str:
    try:
        return short(found.best)
    except UserError as error:
        return str(error)


def _other_batch(given: dict[str, Any]) -> str:
    """The next larger batch, by powers of two, that these GPUs can share out."""
    batch = given["batch"]
    for factor in (2, 4, 8, 16):
        if batch and search(**{**given, "batch": batch * factor}).fitting:
            return f"; --batch {batch * factor} has layouts (DualPipe needs two sequences per GPU and step)"
    return ""


def _write(folder: Path, text: str, drawn: dict[str, Result]) -> None:
    from examples.plan import plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots.time_terms(folder / "time.png", drawn)
        plots.memory_items(folder / "memory.png", drawn)
        part = folder / "plan.md.part"
        part.write_text(f"```\n{text}\n```\n\n![time](time.png)\n![memory](memory.png)\n", encoding="utf-8")
        part.replace(folder / "plan.md")
    except OSError as error:
        raise UserError(
            f"--out: must be a folder that can be written; got {folder}: {error.strerror}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
