"""The one training loop: token-indexed schedules, guarded steps, exact resume.

A step is: read the schedules at the tokens seen so far, draw that many rows, sum gradients in FP32 over micro-batches,
ask the guard, update the masters, move the routing bias, hand the masters to the EMA on the CPU. Everything that the
next step depends on is in a checkpoint, so that a run killed at any moment continues bit for bit as if it had not been.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_ops.moe import max_violation
from deepseek_ops.optimizer import CpuEma
from examples.configs import RunConfig, to_dict
from examples.data.pack import Batch, PackedLoader
from examples.data.shards import ShardReader
from examples.data.shuffle import RowShuffle
from examples.errors import UserError
from examples.evals.perplexity import HeldOut, held_out_loss
from examples.model.transformer import LossOutput, Transformer
from examples.train.checkpoint import load_latest, save_checkpoint
from examples.train.guard import GuardPolicy, LossGuard
from examples.train.metrics import MetricsWriter, Progress
from examples.train.optim import MOMENTS, MixedAdamW
from examples.train.rng import capture_rng, restore_rng, seed_rng


class Trainer:
    """Pre-training of one model in one folder: `metrics.jsonl` and `checkpoints/` appear there.

    train, val: shards by source. Constructing it continues from the newest checkpoint if there is one.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        train: Mapping[str, ShardReader],
        val: Mapping[str, ShardReader],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.folder, self.val = config, folder, val
        self.schedule = config.train.schedule
        self.model = Transformer(config.model).to(device)
        # After construction, which draws more or fewer numbers with the precision: a seed means the same weights.
        seed_rng(config.train.seed)
        self.model.reset_parameters()
        self.optimizer = MixedAdamW(self.model, self.schedule.optimizer, MOMENTS[config.train.moments])
        self.ema = CpuEma(self.optimizer.masters, config.train.ema_decay)
        data = config.data
        self.weights = mixture_weights(config, train)
        rows = PackedLoader(
            train, self.weights, data.seq_len, seed=data.seed, mask_documents=data.document_mask
        )
        self.loader = RowShuffle(rows, data.shuffle_rows, seed=data.seed)
        self.guard = LossGuard(GuardPolicy(action=config.train.guard))
        self.step = self.tokens = 0
        self.stop_tokens = min(
            self.schedule.total_tokens, config.train.stop_tokens or self.schedule.total_tokens
        )
        self.held_out: HeldOut | None = None
        self._interrupted = False
        self._resume()

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "ema": self.ema.state_dict(),
        }

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        meta = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "rng": capture_rng(),
            "config": to_dict(self.config),
        }
        return save_checkpoint(self.folder, self.step, self._tensors(), meta)

    def _resume(self) -> None:
        tensors = self._tensors()
        checkpoint = load_latest(self.folder, into=tensors)
        if checkpoint is None:
            return
        self.ema.load_state_dict(tensors["ema"])
        meta = checkpoint.meta
        self.step, self.tokens = meta["step"], meta["tokens"]
        self.loader.load_state_dict(meta["loader"])
        self.guard.load_state_dict(meta["guard"])
        restore_rng(meta["rng"])
        print(f"  continuing from step {self.step} ({checkpoint.path})", flush=True)

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last token has been trained on."""
        return self.tokens >= self.stop_tokens

    def run(self) -> HeldOut:
        """Train to the end and return the held-out result. Ctrl-C or SIGTERM: finish the step, save, interrupt."""
        train = self.config.train
        old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        progress = Progress(self.stop_tokens, done_tokens=self.tokens)
        try:
            with MetricsWriter(
                self.folder / "metrics.jsonl", after_step=self.step, tensorboard=self.folder / "tensorboard"
            ) as metrics:
                while not self.finished:
                    record = self.train_step()
                    metrics.write(self.step, **record)
                    progress.update(
                        self.step,
                        self.tokens,
                        record["loss"],
                        max_violation=max(record["max_violation"], default=None),
                    )
                    last = self.finished
                    if last or (train.eval_every and self.step % train.eval_every == 0):
                        self.held_out = self.evaluate()
                        metrics.write(self.step, tokens=self.tokens, held_out=self.held_out.to_dict())
                    if (
                        last
                        or self._interrupted
                        or (train.checkpoint_every and self.step % train.checkpoint_every == 0)
                    ):
                        self.save()
                    if self._interrupted and not last:
                        raise KeyboardInterrupt
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        return self.held_out or self.evaluate()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt  # the second time, at once
        self._interrupted = True
        print("\n  stopping after this step (again: at once)", flush=True)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        start = time.perf_counter()
        schedule = self.schedule
        lr = schedule.learning_rate(self.step, self.tokens)
        gamma = schedule.bias_speed(self.tokens)
        mtp_weight = schedule.mtp_weight(self.tokens)
        rows = schedule.batch_size(self.tokens)

        outputs = self._backward(self._micro_batches(rows), mtp_weight)
        loss = float(sum(output.main for output in outputs))
        norm, scale = self.optimizer.norm()
        self.step += 1
        verdict = self.guard.check(self.step, loss, float(norm))
        if verdict.reason:
            print(
                f"  step {self.step}: {verdict.reason}{'' if verdict.update else '; update skipped'}",
                flush=True,
            )
        counts = sum(output.counts for output in outputs)
        if verdict.update:
            self.optimizer.step(self.step, lr, scale)
            self.model.update_bias(gamma)
            self.ema.update(self.optimizer.masters)
        else:
            self.model.update_bias(0.0)
        self.optimizer.zero()
        tokens = rows * self.config.data.seq_len
        self.tokens += tokens
        return {
            "tokens": self.tokens,
            "loss": loss,
            "mtp_loss": [float(sum(values)) for values in zip(*(o.mtp for o in outputs), strict=True)],
            "balance_loss": float(sum(output.balance for output in outputs)),
            "grad_norm": float(norm),
            "lr": lr,
            "gamma": gamma,
            "mtp_weight": mtp_weight,
            "batch_size": rows,
            "max_violation": [float(max_violation(layer)) for layer in counts],
            "updated": verdict.update,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def _micro_batches(self, rows: int) -> list[Batch]:
        device = self.model.embed.weight.device
        sizes = micro_batches(rows, self.config.train.micro_batch)
        return [self.loader.next_batch(n).to(device) for n in sizes]

    def _backward(self, batches: list[Batch], mtp_weight: float) -> list[LossOutput]:
        """Gradients of the whole batch's loss, micro-batch by micro-batch, into the optimizer's FP32 sums."""
        self.model.train()
        count = sum(int(batch.loss_mask.sum()) for batch in batches)
        outputs = []
        for batch in batches:
            layout = (
                {"cu_seqlens": batch.cu_seqlens, "positions": batch.positions} if batch.document_mask else {}
            )
            output = self.model.loss(
                batch.tokens,
                loss_mask=batch.loss_mask if batch.document_mask else None,
                mtp_weight=mtp_weight,
                balance_alpha=self.schedule.balance_alpha,
                normalizer=count,
                **layout,
            )
            output.loss.backward()
            self.optimizer.accumulate()
            outputs.append(output)
        return outputs

    def evaluate(self, max_tokens: int = 16384) -> HeldOut:
        """Held-out loss of every source."""
        data = self.config.data
        return held_out_loss(
            self.model,
            self.val,
            data.seq_len,
            max_tokens=max_tokens,
            mask_documents=data.document_mask,
            weights=self.weights,
        )


def micro_batches(rows: int, size: int) -> list[int]:
    """Rows of each pass: `size` (0: all at once), and what is left."""
    size = size or rows
    return [size] * (rows // size) + ([rows % size] if rows % size else [])


def mixture_weights(config: RunConfig, train: Mapping[str, ShardReader]) -> dict[str, float]:
    """Share of tokens per source: as configured, for those that are present; else in proportion to their size."""
    data = config.data
    if data.weights is None:
        total = sum(reader.tokens for reader in train.values())
        return {name: reader.tokens / total for name, reader in train.items()}
    weights = dict(zip(data.sources, data.weights, strict=True))
    present = {name: weights.get(name, 0.0) for name in train}
    total = sum(present.values())
    if total <= 0 or min(present.values()) <= 0:
        raise UserError(f"data.weights: must give every source of the shards a positive share; got {present}")
    return {name: share / total for name, share in present.items()}


def check_tokenizer(config: RunConfig, vocab_size: int) -> None:
    """The model must have a row for every token; a larger model would never train the rest."""
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: must be at least the tokenizer's {vocab_size}; got {config.model.vocab_size}"
        )
