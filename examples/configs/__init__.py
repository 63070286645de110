"""Every number of the report, once, with its section; and the same recipe at sizes that fit smaller machines.

`get_config("tiny")` gives a `RunConfig`; `parse_overrides(config, ["model.hidden_size=256"])` changes it;
`to_dict` and `run_config_from_dict` write and read it as JSON. Importing this does not import torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.errors import UserError
from examples.fields import dataclass_from_dict, replace_values, to_dict
from examples.model.config import ModelConfig, YarnConfig

CONFIG_NAMES = ("tiny", "small", "v3_16b", "v3_671b")

__all__ = [
    "CONFIG_NAMES",
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "YarnConfig",
    "get_config",
    "parse_overrides",
    "quick",
    "run_config_from_dict",
    "to_dict",
]


def get_config(name: str) -> RunConfig:
    """The configuration of that name; `UserError` names the nearest one if there is none."""
    if name not in CONFIG_NAMES:
        near = difflib.get_close_matches(name, CONFIG_NAMES, n=1, cutoff=0.3)
        advice = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"config: must be one of {', '.join(CONFIG_NAMES)}; {advice}got {name!r}")
    return importlib.import_module(f"examples.configs.{name}").CONFIG


def parse_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Apply ``section.key=value`` strings, typed by the fields; see `examples.fields.replace_values`."""
    return replace_values(config, overrides)


def run_config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_dict`, from JSON; unknown keys and wrong types raise `UserError`."""
    return dataclass_from_dict(RunConfig, values)


def quick(config: RunConfig) -> RunConfig:
    """The same run on a third of the tokens, with every token-indexed boundary moved alike, and shorter post-training.

    Fine-tuning keeps the problems of the kind that GRPO trains on: without them there would be no right answer to reinforce.
    """
    schedule = config.train.schedule
    rate = schedule.learning_rate
    shorter = schedule.scaled(
        schedule.total_tokens // 3,
        sequence_length=schedule.sequence_length,
        start_batch=schedule.batch_size.start,
        end_batch=schedule.batch_size.end,
        batch_quantum=schedule.batch_size.quantum,
        warmup_fraction=rate.warmup_steps / max(1, schedule.count_steps()),
    )
    sft, grpo, distill = config.sft, config.grpo, config.distill
    counts = tuple(
        count if name == grpo.task else count // 3
        for name, count in zip(sft.sources, sft.counts, strict=True)
    )
    return replace(
        config,
        train=replace(config.train, schedule=shorter),
        extend=config.extend.shorter(3),
        sft=replace(sft, counts=counts),
        grpo=replace(grpo, steps=max(1, grpo.steps // 3)),
        distill=replace(distill, problems=max(1, distill.problems // 2)),
        reward=config.reward.quick(),
        benchmarks=config.benchmarks.quick(),
    )
