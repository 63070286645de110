"""A trained model out of a run folder of `examples.run`, ready to answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.configs import RunConfig
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.fields import dataclass_from_dict
from examples.model.transformer import Transformer
from examples.stages.tokenize import tokenizer_path
from examples.train.checkpoint import list_checkpoints, load_latest


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, and the stage and step that it comes from."""

    model: Transformer
    tokenizer: Tokenizer
    stage: str
    step: int

    @property
    def chats(self) -> bool:
        """Whether its stage trained it on conversations; pre-training has not."""
        return self.stage not in ("pretrain", "extend", "without_bias", "fp8")


def stages_with_weights(root: Path) -> list[str]:
    """Stages of a run that have a checkpoint, in the recipe's order; first what nobody talks to: twins,
    and the judge; last those that have finished."""
    from examples.stages import RECIPE
    from examples.stages.record import read_done

    names = [stage.name for stage in RECIPE if list_checkpoints(root / stage.name)]
    apart = ("without_bias", "fp8", "reward")
    return sorted(names, key=lambda name: (name not in apart, read_done(root, name) is not None))


def load_run(root: Path, stage: str | None = None, *, device: str = "cpu") -> Loaded:
    """The newest weights of `stage`, default the last stage of the recipe that has any."""
    root = Path(root)
    if not (root / "config.json").is_file():
        raise UserError(f"run folder: must be one of examples.run, with a config.json; got {root}")
    found = stages_with_weights(root)
    if stage is None and found:
        stage = found[-1]
    if stage is None or not list_checkpoints(root / stage):
        having = f"stages with one: {', '.join(found) or 'none'}"
        raise UserError(f"{root}: stage {stage or 'pretrain'!r} must have a checkpoint ({having})")
    tokenizer = Tokenizer.load(tokenizer_path(root))
    checkpoint = load_latest(root / stage)
    assert checkpoint is not None
    config = run_config(root, checkpoint.meta)
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config.model).eval()
    try:
        model.load_state_dict(checkpoint.tensors["model"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{checkpoint.path}: must hold the model of its configuration; got {error}") from None
    if tokenizer.vocab_size > config.model.vocab_size:
        rule = f"at most model.vocab_size={config.model.vocab_size} tokens"
        raise UserError(f"{tokenizer_path(root)}: must have {rule}; got {tokenizer.vocab_size}")
    return Loaded(model.to(device).requires_grad_(False), tokenizer, stage, checkpoint.step)


def run_config(root: Path, meta: dict[str, Any]) -> RunConfig:
    """The configuration that a checkpoint was made with (a stage may have changed the run's), else the run's."""
    values = meta.get("config")
    if not isinstance(values, dict) or "model" not in values:
        try:
            values = json.loads((root / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{root / 'config.json'}: must be JSON; got {error}") from None
    return dataclass_from_dict(RunConfig, values)
