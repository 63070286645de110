"""Pre-training (report section 4.2) and its two twins, which differ from it in one thing each.

    pretrain        the run
    without_bias    gamma = 0: what the routing bias does for balance (section 4.5.2); stops early
    fp8             FP8 Linears and experts: what low precision costs (section 3.3, "below 0.25 %"); the whole run, for
                    the gap that counts is the one that is left when the rate has fallen

A twin has the same weights at the start, the same rows and the same schedule, so it is compared step by step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from examples.configs import RunConfig
from examples.stages.stage import Context
from examples.stages.tokenize import open_data
from examples.train.loop import Trainer, check_tokenizer


def run(context: Context) -> dict[str, Any]:
    """Train the model of the configuration."""
    return _train(context, context.config)


def run_without_bias(context: Context) -> dict[str, Any]:
    """The twin whose routing bias never moves."""
    schedule = context.config.train.schedule
    frozen = replace(schedule, bias_speed=replace(schedule.bias_speed, before=0.0, after=0.0))
    stop = int(schedule.total_tokens * context.config.train.twin_share)
    twin = replace(context.config.train, schedule=frozen, stop_tokens=stop)
    return _train(context, replace(context.config, train=twin))


def run_fp8(context: Context) -> dict[str, Any]:
    """The twin in FP8."""
    config = context.config
    model, train = (
        replace(config.model, precision="fp8"),
        replace(config.train, eval_every=0),
    )  # only at its end
    return _train(context, replace(config, model=model, train=train))


def _train(context: Context, config: RunConfig) -> dict[str, Any]:
    tokenizer, train, val = open_data(context.root)
    check_tokenizer(config, tokenizer.vocab_size)
    trainer = Trainer(config, context.folder, train, val)
    parameters = trainer.model.num_parameters()
    extra = trainer.model.num_parameters(mtp=True)
    print(
        f"  {parameters / 1e6:.2f}M parameters + {extra / 1e6:.2f}M in MTP, {config.model.precision}, "
        f"{trainer.stop_tokens / 1e6:.2f}M tokens in rows of {config.data.seq_len}",
        flush=True,
    )
    held_out = trainer.run()
    worst = max(held_out.max_violation, default=0.0)
    print(
        f"  held-out loss {held_out.loss:.4f} nats/token, {held_out.bits_per_byte:.3f} bits/byte, MaxVio {worst:.2f}",
        flush=True,
    )
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "parameters": parameters,
        "mtp_parameters": extra,
        "precision": config.model.precision,
        "held_out": held_out.to_dict(),
    }
