"""What the stages after pre-training share: start from another stage's weights, take steps, resume to the bit.

A stage gives `train_step` and `evaluate`; here are optimizer, checkpoints, signals, metrics and the progress line. Everything
that a step draws is a function of (seed, step), and everything that it changes is in the checkpoint, so that a run killed at
any moment continues as if it had not been.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.configs.schedules import AdamWSettings
from examples.data.pack import Batch
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.transformer import Transformer
from examples.train.checkpoint import load_latest, save_checkpoint
from examples.train.metrics import MetricsWriter, read_metrics
from examples.train.optim import MixedAdamW
from examples.train.rng import seed_rng

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Weights:
    """What a finished stage left: its model's shape, state and FP32 masters (of the parameters that have them)."""

    config: ModelConfig
    model: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]

    def build(self, device: torch.device | str = "cpu") -> Transformer:
        """A model with these weights."""
        model = Transformer(self.config).to(device)
        model.load_state_dict(self.model)
        return model


def start_weights(folder: Path) -> Weights:
    """The newest checkpoint of a stage; `UserError` if there is none."""
    checkpoint = load_latest(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: must hold a checkpoint to start from; got none; run that stage first")
    try:
        config = ModelConfig.from_dict(checkpoint.meta["config"]["model"])
        tensors = checkpoint.tensors
        return Weights(config, tensors["model"], tensors["optimizer"].get("masters", {}))
    except KeyError as error:
        raise UserError(
            f"{checkpoint.path}: must hold a model and its configuration; lacks {error}"
        ) from None


class PostTrainer(ABC):
    """Base of the stages after pre-training, in one folder: `metrics.jsonl` and `checkpoints/` appear there.

    weights: where it starts. config: a JSON-able record for the checkpoint, with the model's shape under "model".
    Constructing it continues from the newest checkpoint if there is one.
    """

    metric = "loss"  # what the progress line shows

    def __init__(
        self,
        folder: Path,
        weights: Weights,
        config: dict[str, Any],
        *,
        optimizer: AdamWSettings,
        moments: torch.dtype,
        total_steps: int,
        eval_every: int,
        checkpoint_every: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.config = folder, config
        self.total_steps, self.eval_every, self.checkpoint_every = total_steps, eval_every, checkpoint_every
        self.model = weights.build(device)
        seed_rng(seed)
        self.optimizer = MixedAdamW(self.model, optimizer, moments)
        for name, master in weights.masters.items():
            self.optimizer.masters[name].copy_(master)
        self.step = self.updates = self.tokens = 0
        self._interrupted = False

    # --- to be given by the stage ----------------------------------------------------------------------------------

    @abstractmethod
    def train_step(self) -> dict[str, Any]:
        """One step; advances `step`, `updates` and `tokens` and returns metrics."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Held-out metrics of this moment."""

    def extra_tensors(self) -> dict[str, Any]:
        """State beside model and optimizer."""
        return {}

    def extra_meta(self) -> dict[str, Any]:
        """JSON state, for what a step draws that is no function of (seed, step)."""
        return {}

    def load_extra_meta(self, meta: dict[str, Any]) -> None:  # noqa: B027  (most stages have none)
        """Continue from what `extra_meta` gave."""

    def evaluation_due(self) -> bool:
        """Whether an evaluation follows the step that has just been taken; one always follows the last."""
        return bool(self.eval_every) and self.step % self.eval_every == 0

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Any]:
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors()}
        return tensors | self.extra_tensors()

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        meta = {"step": self.step, "updates": self.updates, "tokens": self.tokens, "config": self.config}
        return save_checkpoint(self.folder, self.step, self._tensors(), meta | self.extra_meta())

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one. The stage calls it when it is complete."""
        checkpoint = load_latest(self.folder, into=self._tensors())
        if checkpoint is None:
            return
        meta = checkpoint.meta
        self.step, self.updates, self.tokens = meta["step"], meta["updates"], meta["tokens"]
        self.load_extra_meta(meta)
        print(f"  continuing from step {self.step} ({checkpoint.path})", flush=True)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def backward_next_tokens(
        self, batches: Sequence[Batch], mtp_weight: float, balance_alpha: float
    ) -> dict[str, Any]:
        """Add up the gradients of one step's loss, batch by batch; returns its parts."""
        count = sum(int(batch.loss_mask.sum()) for batch in batches)
        outputs = []
        for batch in batches:
            output = self.model.loss(
                batch.tokens,
                cu_seqlens=batch.cu_seqlens,
                positions=batch.positions,
                loss_mask=batch.loss_mask,
                mtp_weight=mtp_weight,
                balance_alpha=balance_alpha,
                normalizer=max(count, 1),
            )
            output.loss.backward()
            self.optimizer.accumulate()
            outputs.append(output)
        return {
            "loss": float(sum(output.main for output in outputs)),
            "mtp_loss": [float(sum(values)) for values in zip(*(o.mtp for o in outputs), strict=True)],
        }

    def update(self, lr: float, bias_speed: float) -> float:
        """One optimizer step with the gradients that were accumulated; returns their norm. Not finite is an error."""
        norm, scale = self.optimizer.norm()
        if not bool(torch.isfinite(norm)):
            raise UserError(f"step {self.step + 1}: the gradient is not finite; lower the learning rate")
        self.updates += 1
        self.optimizer.step(self.updates, lr, scale)
        self.optimizer.zero()
        self.model.update_bias(bias_speed)
        return float(norm)

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train to the end; (held-out metrics before the first step, after the last). Ctrl-C or SIGTERM: save, interrupt."""
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        path = self.folder / "metrics.jsonl"
        begin, first, printed = time.monotonic(), self.step, 0.0
        try:
            with MetricsWriter(path, after_step=self.step or -1) as metrics:
                if self.step == 0:
                    metrics.write(0, held_out=self.evaluate())
                while self.step < self.total_steps and not self._interrupted:
                    record = self.train_step()
                    metrics.write(self.step, tokens=self.tokens, **record)
                    last = self.step == self.total_steps
                    if last or self.evaluation_due():
                        metrics.write(self.step, held_out=self.evaluate())
                    due = self.checkpoint_every and self.step % self.checkpoint_every == 0
                    if last or due or self._interrupted:
                        self.save()
                    now = time.monotonic()
                    if last or now - printed > PROGRESS_SECONDS:
                        printed = now
                        self._say(record, (now - begin) / (self.step - first))
            if self._interrupted and self.step < self.total_steps:
                raise KeyboardInterrupt
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        evaluations = [r["held_out"] for r in read_metrics(path) if "held_out" in r]
        return evaluations[0], evaluations[-1]

    def _say(self, record: dict[str, Any], seconds: float) -> None:
        left = round(seconds * (self.total_steps - self.step))
        print(
            f"  step {self.step:>5}/{self.total_steps}  {self.metric} {record[self.metric]:.4f}  "
            f"{record['tokens_per_second']:.0f} tok/s  {1 / seconds:.2f} steps/s  ETA {left // 60}m{left % 60:02}s",
            flush=True,
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt  # the second time, at once
        self._interrupted = True
        print("\n  stopping after this step (again: at once)", flush=True)
