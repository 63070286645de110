"""SFT and GRPO of examples/stages beside trl's trainers: the same tiny model, weights and data, one run, step by step in turns.

    python -m bench.trl_baseline [NAME] [--quick] [--only sft grpo] [--steps N] [--threads N] [--json FILE] [key=value ...]

trl is an optional package (`requirements/optional.txt`). Its trainers run their own loop on transformers' DeepseekV3 with our
weights, as their users call them; a callback reads losses and times and lets ours take its step after each of theirs, so that a
busy machine slows both. With one thread (the default) time is the CPU time of the process, with more it is wall time.

SFT: equal samples in each step, answers' loss only, equal optimizer settings and rates. trl gets the samples in both of its forms:
`packed`, our rows as its padding-free collator flattens them, and `padded`, its default, one sample a row. In fp32 the loss of every
step must agree to 1e-4; in bf16 trl's is autocast over fp32 weights, its default, ours bf16 weights with fp32 masters.
GRPO: the same questions, group, length, reward, beta and one update per rollout; each samples by its own generation, so losses
cannot be equal. What can is checked: the same outputs, advantages, old and reference log-probabilities give the same loss and
gradient. Tokens are those of the samples, or of questions and answers, without padding, over the time of whole steps.

On both sides: no MTP, no balance loss, no recomputation (trl's default recomputes), the routing bias frozen (trl never moves it).
Left as each has it: trl also computes entropy and accuracy of tokens; ours replays the rollout's experts, and measures the entropy in GRPO.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.beside_trl.grpo import grpo, grpo_formula
from bench.beside_trl.sft import sft
from bench.beside_trl.turns import Start, need_trl
from bench.transformers_baseline import build
from examples.configs import RunConfig, get_config, parse_overrides
from examples.data.chat_sources import load_chats
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.config import Precision
from examples.train.runner import Weights

KL = 0.04  # DeepSeekMath's: with a term on both sides every output of both is computed in every step
TOLERANCE = 1e-4  # of losses, and of gradients relative to the largest


def settings(config: RunConfig, precision: Precision, answer: int) -> RunConfig:
    """The configuration with what one of the two sides lacks switched off, and answers of at most `answer` tokens in GRPO."""
    return replace(
        config,
        model=replace(config.model, mtp_depth=0, precision=precision),
        train=replace(config.train, moments="fp32" if precision == "fp32" else config.train.moments),
        sft=replace(
            config.sft,
            sources=("sums", "worked"),
            counts=(4000, 400),
            mtp_weight=0.0,
            balance_alpha=0.0,
            bias_speed=0.0,
        ),
        grpo=replace(
            config.grpo,
            updates=1,
            minibatches=1,
            normalization="grpo",
            max_new_tokens=answer,
            beta=config.grpo.beta or KL,
            kl_every=0,
            warmup=0,
            final_rate=None,
        ),
    )


def measure(options: argparse.Namespace, config: RunConfig) -> dict[str, dict[str, Any]]:
    """All cases that were asked for, by name; prints a line of the table for each."""
    common = settings(config, "fp32", options.answer[0]).sft
    chats = load_chats(common.sources, common.counts, seed=common.seed)
    texts = [message["content"] for group in chats.values() for chat in group for message in chat]
    tokenizer = Tokenizer.train(texts, config.model.vocab_size)
    cases: dict[str, dict[str, Any]] = {}

    def add(name: str, row: dict[str, Any]) -> None:
        cases[name] = row
        show(name, row)

    for precision in options.precision:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            wanted = settings(config, precision, options.answer[0])
            ours, theirs = build(wanted.model)
            theirs.save_pretrained(folder / "hf")
            tokenizer.save(folder / "hf")
            weights = Weights(wanted.model, ours.state_dict(), {})
            start = Start(wanted, folder, weights, tokenizer, chats, options.threads)
            if "sft" in options.only:
                for form in ("packed", "padded"):
                    add(f"sft {precision}, {form}", sft(start, form, options.steps))
            if "grpo" in options.only:
                if precision == "fp32":
                    add("grpo, same outputs", grpo_formula(start))
                for answer in options.answer:
                    longer = replace(start, config=settings(config, precision, answer))
                    add(f"grpo {precision}, answers of {answer}", grpo(longer, options.steps))
    return cases


def show(name: str, row: dict[str, Any]) -> None:
    """The lines of a case in the table."""
    gaps = "".join(
        f"   {key.replace('_', ' ')} {row[key]:.1e}" for key in ("loss_gap", "gradient_gap") if key in row
    )
    if "ratio" not in row:
        print(f"{name:26}{gaps}", flush=True)
        return
    rates = f"{row['ours_tokens_per_s']:10.0f}{row['trl_tokens_per_s']:10.0f}"
    print(f"{name:26}{rates}{row['ratio']:8.2f}{row['ratio_worst_turn']:8.2f}{gaps}", flush=True)
    print(f"{'':26}turns {' '.join(f'{ratio:.2f}' for ratio in row['ratios'])}", flush=True)


def wrong(cases: Mapping[str, dict[str, Any]]) -> list[str]:
    """Cases whose two sides should agree and do not; bf16 rounds otherwise on each side."""
    return [
        name
        for name, row in cases.items()
        if "bf16" not in name
        and not all(row.get(key, 0.0) <= TOLERANCE for key in ("loss_gap", "gradient_gap"))
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = argparse.ArgumentParser(prog="python -m bench.trl_baseline", description=__doc__)
    arguments.add_argument("name", nargs="?", default="tiny", help="configuration")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    arguments.add_argument("--only", nargs="+", choices=("sft", "grpo"), default=["sft", "grpo"])
    arguments.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments.add_argument("--answer", type=int, nargs="+", default=[6, 48], help="longest answers of GRPO")
    arguments.add_argument("--steps", type=int, default=16, help="of each case, the first 2 to warm up")
    arguments.add_argument("--quick", action="store_true", help="fp32, short answers, 12 steps")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--json", type=Path, help="also write the result here")
    options = arguments.parse_intermixed_args(argv)
    if options.quick:
        options.precision, options.answer, options.steps = ["fp32"], options.answer[:1], 12
    try:
        config = parse_overrides(get_config(options.name), options.overrides)
        need_trl()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import datasets
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    print(f"{options.name}, {options.threads} thread(s), {platform.machine()}, {versions}")
    print(f"{'':26}{'ours':>10}{'trl':>10}{'ratio':>8}{'worst':>8}   (tokens/s)")
    try:
        cases = measure(options, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"config": options.name, "overrides": options.overrides, "threads": options.threads}
        options.json.write_text(json.dumps({**record, "versions": versions, "cases": cases}, indent=2) + "\n")
    if differ := wrong(cases):
        print(f"error: {'; '.join(differ)}: the two sides differ by more than {TOLERANCE}", file=sys.stderr)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
