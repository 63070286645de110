"""GRPO (report section 5.2.2) on problems whose answers a rule can check, with our own sampler and its experts replayed.

A step: draw questions, sample G answers of each from the policy, reward them, turn rewards into advantages within each
group, then take gradient steps on the packed outputs. The reference model is the policy of the first step. What a step draws is
a function of (seed, step), so that a run that was killed continues to the bit.

What is solved and what is rewarded is a `Task` (`examples.stages.tasks`).
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.configs import RunConfig, to_dict
from examples.data.chat import chat, encode_prompt
from examples.data.chat_sources import Problem
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rewards.rules import values_of
from examples.rollout.group import Rollout, sample_groups
from examples.stages.reward import trained_judge
from examples.stages.stage import Context
from examples.stages.tasks import Task, greedy_accuracy, make_task
from examples.stages.tokenize import tokenizer_path
from examples.train.grpo import advantages, normalization, policy_loss, token_weights
from examples.train.loop import check_tokenizer
from examples.train.optim import MOMENTS
from examples.train.outputs import PackedOutputs, merge_equal, pack_outputs, token_logprobs
from examples.train.runner import PostTrainer, Weights, start_weights


def run(context: Context) -> dict[str, Any]:
    """Train the policy of stage `grpo.start`."""
    config = context.config.grpo
    tokenizer = Tokenizer.load(tokenizer_path(context.root))
    check_tokenizer(context.config, tokenizer.vocab_size)
    weights = start_weights(context.root / config.start)
    judge = trained_judge(context.root, context.config, tokenizer) if config.judge else None
    task = make_task(context.config, judge)
    trainer = GrpoTrainer(context.config, context.folder, weights, tokenizer, task)
    print(
        f"  {config.steps} steps of {config.prompts} questions x {config.group} answers, "
        f"normalization {config.normalization}, replay {'on' if config.replay else 'off'}",
        flush=True,
    )
    first, last = trainer.run()
    print(f"  greedy held-out accuracy {first['accuracy']:.3f} -> {last['accuracy']:.3f}", flush=True)
    return {
        "steps": trainer.step,
        "before": first,
        "after": last,
        "gain": last["accuracy"] - first["accuracy"],
    }


@dataclass(frozen=True)
class StepBatch:
    """Of all N outputs of a step: advantage, weight of each term, and how many equal outputs each stands for (0: another
    stands for it)."""

    advantage: torch.Tensor
    weight: torch.Tensor
    copies: torch.Tensor


class GrpoTrainer(PostTrainer):
    """One run; see `PostTrainer`."""

    metric = "reward"

    def __init__(
        self, config: RunConfig, folder: Path, weights: Weights, tokenizer: Tokenizer, task: Task
    ) -> None:
        self.settings, self.tokenizer, self.task = config.grpo, tokenizer, task
        self.kind = normalization(config.grpo.normalization)
        self.prompts = [encode_prompt(tokenizer, chat(p.question, "")[:1]) for p in task.train]
        self.row = min(config.data.seq_len, weights.config.max_positions)
        longest = max(map(len, self.prompts)) + config.grpo.max_new_tokens - 1
        if longest > self.row:
            raise UserError(
                f"grpo.max_new_tokens: question and answer must fit into data.seq_len = {self.row} fed tokens; the "
                f"longest would have {longest}"
            )
        super().__init__(
            folder,
            weights,
            to_dict(config) | {"model": asdict(weights.config)},
            optimizer=config.grpo.optimizer,
            moments=MOMENTS[config.train.moments],
            total_steps=config.grpo.steps,
            eval_every=config.grpo.eval_every,
            checkpoint_every=config.grpo.checkpoint_every,
            seed=config.grpo.seed,
        )
        self.reference: Transformer | None = None
        if config.grpo.beta or config.grpo.kl_every:
            self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.resume()

    def extra_tensors(self) -> dict[str, Any]:
        """The reference, if it changes; else it is the stage's start."""
        moves = self.reference is not None and self.settings.reference_every
        return {"reference": self.reference.state_dict()} if moves else {}

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """Sample, judge, learn; returns metrics."""
        begin, c = time.perf_counter(), self.settings
        rng = np.random.Generator(np.random.Philox(key=[c.seed, self.step]))
        chosen = rng.choice(len(self.prompts), c.prompts, replace=len(self.prompts) < c.prompts)
        outputs = sample_groups(
            self.model,
            [self.prompts[i] for i in chosen],
            c.group,
            c.max_new_tokens,
            eos=self.tokenizer.eos_id,
            temperature=c.temperature,
            seed=int(rng.integers(1 << 62)),
        )
        sampled = time.perf_counter() - begin
        rewards, right = self.judge([self.task.train[i] for i in chosen], outputs)
        advantage, same = advantages(rewards, by_std=self.kind.by_std)
        metrics = self.learn(outputs, advantage.flatten())
        self.step += 1
        if self.reference is not None and c.reference_every and self.step % c.reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        tokens = sum(len(o.prompt) + len(o.tokens) for o in outputs)
        self.tokens += tokens
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(1, correction=0).mean()),
            "accuracy": right,
            "zero_variance_groups": float(same.double().mean()),
            "length": sum(len(o.tokens) for o in outputs) / len(outputs),
            "entropy": sum(o.entropy for o in outputs) / sum(len(o.tokens) for o in outputs),
            "ended": sum(o.ended for o in outputs) / len(outputs),
            **metrics,
            "lr": c.rate(self.step - 1),
            "rollout_seconds": sampled,
            "tokens_per_second": tokens / (time.perf_counter() - begin),
        }

    def judge(self, problems: Sequence[Problem], outputs: Sequence[Rollout]) -> tuple[torch.Tensor, float]:
        """Rewards fp64 [P, G], and the share of right answers."""
        task = self.task
        asked = [
            (problem.question, self.tokenizer.decode(output.tokens, skip_special=True), problem.answer)
            for problem, group in zip(problems, _grouped(outputs, self.settings.group), strict=True)
            for output in group
        ]
        values = values_of(task.reward, asked)
        right = values if task.reward is task.verifier else values_of(task.verifier, asked)
        rewards = torch.tensor(values, dtype=torch.float64).view(-1, self.settings.group)
        return rewards, sum(right) / len(right)

    def learn(self, outputs: Sequence[Rollout], advantage: torch.Tensor) -> dict[str, float]:
        """The optimizer steps on one batch of rollouts."""
        c = self.settings
        self.model.train()
        device = self.model.embed.weight.device
        compared = self.reference is not None and bool(c.beta or self.step % c.kl_every == 0)
        size = c.prompts // c.minibatches * c.group
        lengths = torch.tensor([len(output.tokens) for output in outputs])
        gains, packed = advantage.tolist(), []
        weight = torch.zeros(len(outputs), dtype=torch.float64)
        copies = torch.zeros(len(outputs), dtype=torch.int64)
        for start in range(0, len(outputs), size):
            part = range(start, min(start + size, len(outputs)))
            weight[part.start : part.stop] = token_weights(
                lengths[part.start : part.stop], self.kind, c.max_new_tokens
            )
            # Without a KL term nothing pulls at an output whose advantage is 0: groups without variance cost no pass.
            which, count = merge_equal(outputs, [i for i in part if compared or gains[i]], gains)
            copies[which] = torch.tensor(count, dtype=torch.int64)
            packs = pack_outputs(outputs, which, self.row, self.tokenizer.pad_id, c.micro_batch)
            packed.append([pack.to(device) for pack in packs])
        batch = StepBatch(advantage.to(device), weight.to(device), copies.to(device))
        with torch.no_grad():
            for pack in (p for part in packed for p in part):
                if len(packed) * c.updates > 1:  # else the policy is still the one that sampled
                    pack.old = token_logprobs(self.model, pack, c.temperature, replay=c.replay)
                if compared:
                    pack.reference = token_logprobs(self.reference, pack, c.temperature, replay=False)
        total: Counter[str] = Counter()
        norms = [0.0]
        for update in range(c.updates):
            for part in filter(None, packed):
                for pack in part:
                    total.update(self.backward(pack, batch, first=update == 0))
                norms.append(self.update(c.rate(self.step), 0.0))
        return ({"kl": total["kl"] / total["terms"]} if compared else {}) | {
            "clip_fraction": total["clipped"]
            / (c.updates * (len(outputs) if self.kind.whole else int(lengths.sum()))),
            "rollout_gap": total["rollout_gap"] * c.updates / max(1, total["tokens"]),
            "computed": float((copies > 0).double().mean()),
            "grad_norm": max(norms),
        }

    def backward(self, pack: PackedOutputs, batch: StepBatch, *, first: bool) -> dict[str, float]:
        """Adds the gradients of some outputs; returns sums over their terms and tokens, each as often as it was drawn.

        first: whether it is the first pass over them, in which the policy is still near the sampler.
        """
        c = self.settings
        logprob = token_logprobs(self.model, pack, c.temperature, replay=c.replay)
        old = logprob.detach() if pack.old is None else pack.old
        result = policy_loss(
            logprob,
            old,
            pack.reference,
            pack.output,
            batch.advantage,
            batch.weight,
            copies=batch.copies,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            beta=c.beta,
            whole=self.kind.whole,
        )
        result.loss.backward()
        self.optimizer.accumulate()
        times = batch.copies[pack.output]
        return {
            "loss": float(result.loss.detach()),
            "kl": float(result.kl),
            "clipped": float(result.clipped),
            "terms": result.count,
            "tokens": int(times.sum()),
            "rollout_gap": float((times * (old - pack.sampled).abs()).sum()) if first else 0.0,
        }

    def evaluate(self) -> dict[str, Any]:
        """Greedy accuracy on the held-out problems."""
        return greedy_accuracy(self.model, self.tokenizer, self.task, self.settings.max_new_tokens)


def _grouped(outputs: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    return [outputs[i : i + size] for i in range(0, len(outputs), size)]
