"""GRPO (report section 5.2.2) on problems whose answers a rule can check, with our own sampler and its experts replayed.

A step: draw questions, sample G answers of each from the policy, reward them, turn rewards into advantages within each
group, then take gradient steps on the packed outputs. The reference model is the policy of the first step. What a step draws is
a function of (seed, step), so that a run that was killed continues to the bit.

A task is problems and a callable `reward(prompt, completion, record) -> float`; `sums` is the one that fits a tiny model.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_ops.loss import linear_cross_entropy
from examples.configs import RunConfig, to_dict
from examples.data.chat import ChatSample, chat, encode_prompt
from examples.data.chat_pack import fill_rows, pack_rows
from examples.data.chat_sources import Problem, sums
from examples.data.pack import Batch
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import IGNORED, Transformer
from examples.rollout.generate import generate
from examples.rollout.group import Rollout, sample_groups
from examples.rollout.replay import FREE, main_routers, replaying
from examples.stages.stage import Context
from examples.stages.tokenize import tokenizer_path
from examples.train.grpo import PolicyLoss, advantages, normalization, policy_loss, token_weights
from examples.train.loop import check_tokenizer
from examples.train.optim import MOMENTS
from examples.train.runner import PostTrainer, Weights, start_weights

Reward = Callable[[str, str, dict[str, Any]], float]
POOL = 4096  # training problems, drawn from with replacement between steps
ENTROPY_ROWS = 1024  # logits [this, V] exist at once


@dataclass(frozen=True)
class Task:
    """What is learnt: problems to train on, problems to evaluate with, and the rule that judges an answer."""

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    reward: Reward


_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER = re.compile(r"[+-]?\d{1,18}$")


def exact_integer(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """1 if the answer (the last box if there is one, else all of it) is the integer `record["answer"]`, else 0."""
    boxes = _BOX.findall(completion)
    answer = (boxes[-1] if boxes else completion).strip()
    return float(bool(_INTEGER.match(answer)) and int(answer) == int(record["answer"]))


def sums_task(config: RunConfig) -> Task:
    """One-digit sums; held-out problems are none of those that SFT or GRPO train on."""
    grpo = config.grpo
    return Task(
        "sums", sums(POOL, grpo.seed + 1), sums(grpo.eval_prompts, grpo.seed, held_out=True), exact_integer
    )


def run(context: Context) -> dict[str, Any]:
    """Train the policy of stage `grpo.start`."""
    config = context.config.grpo
    tokenizer = Tokenizer.load(tokenizer_path(context.root))
    check_tokenizer(context.config, tokenizer.vocab_size)
    weights = start_weights(context.root / config.start)
    trainer = GrpoTrainer(context.config, context.folder, weights, tokenizer, sums_task(context.config))
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
        if config.grpo.beta:
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
        rewards = self.judge([self.task.train[i] for i in chosen], outputs)
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
            "zero_variance_groups": float(same.double().mean()),
            "length": sum(len(o.tokens) for o in outputs) / len(outputs),
            "ended": sum(o.ended for o in outputs) / len(outputs),
            **metrics,
            "lr": c.learning_rate,
            "rollout_seconds": sampled,
            "tokens_per_second": tokens / (time.perf_counter() - begin),
        }

    def judge(self, problems: Sequence[Problem], outputs: Sequence[Rollout]) -> torch.Tensor:
        """Rewards fp64 [P, G]."""
        values = [
            self.task.reward(
                problem.question, self.tokenizer.decode(output.tokens, skip_special=True), problem.record
            )
            for problem, group in zip(problems, _grouped(outputs, self.settings.group), strict=True)
            for output in group
        ]
        return torch.tensor(values, dtype=torch.float64).view(-1, self.settings.group)

    def learn(self, outputs: Sequence[Rollout], advantage: torch.Tensor) -> dict[str, float]:
        """The optimizer steps on one batch of rollouts."""
        c = self.settings
        self.model.train()
        device = self.model.embed.weight.device
        size = c.prompts // c.minibatches * c.group
        parts = [range(i, i + size) for i in range(0, len(outputs), size)]
        packed = [
            [
                p.to(device)
                for p in pack_outputs(outputs, part, self.row, self.tokenizer.pad_id, c.micro_batch)
            ]
            for part in parts
        ]
        with torch.no_grad():
            for pack in (p for group in packed for p in group):
                if len(parts) * c.updates > 1:  # else the policy is still the one that sampled
                    pack.old = token_logprobs(self.model, pack, c.temperature, replay=c.replay)
                if self.reference is not None:
                    pack.reference = token_logprobs(self.reference, pack, c.temperature, replay=False)
        total: dict[str, float] = dict.fromkeys(
            ("kl", "clipped", "terms", "entropy", "tokens", "rollout_gap"), 0.0
        )
        norms = []
        for update in range(c.updates):
            for part, group in zip(parts, packed, strict=True):
                lengths = torch.zeros(len(outputs), dtype=torch.int64)
                lengths[part.start : part.stop] = torch.tensor([len(outputs[i].tokens) for i in part])
                weight = torch.zeros(len(outputs), dtype=torch.float64)
                weight[part.start : part.stop] = token_weights(
                    lengths[part.start : part.stop], self.kind, c.max_new_tokens
                )
                for pack in group:
                    result, gap, entropy = self.backward(pack, advantage.to(device), weight.to(device))
                    count = len(pack.output)
                    total["kl"] += float(result.kl)
                    total["clipped"] += float(result.clipped)
                    total["terms"] += result.count
                    total["entropy"] += entropy
                    total["tokens"] += count
                    total["rollout_gap"] += gap * (update == 0)
                norms.append(self.update(c.learning_rate, 0.0))
        return {
            "kl": total["kl"] / total["terms"],
            "clip_fraction": total["clipped"] / total["terms"],
            "entropy": total["entropy"] / total["tokens"],
            "rollout_gap": total["rollout_gap"] * c.updates / total["tokens"],
            "grad_norm": max(norms),
        }

    def backward(
        self, pack: PackedOutputs, advantage: torch.Tensor, weight: torch.Tensor
    ) -> tuple[PolicyLoss, float, float]:
        """Gradients of some outputs; (loss, sum of |trainer's - sampler's log-probability|, sum of entropies)."""
        c = self.settings
        entropy = torch.zeros((), device=pack.output.device)
        logprob = token_logprobs(self.model, pack, c.temperature, replay=c.replay, entropy=entropy)
        old = logprob.detach() if pack.old is None else pack.old
        result = policy_loss(
            logprob,
            old,
            pack.reference,
            pack.output,
            advantage,
            weight,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            beta=c.beta,
            whole=self.kind.whole,
        )
        result.loss.backward()
        self.optimizer.accumulate()
        return result, float((old - pack.sampled).abs().sum()), float(entropy)

    def evaluate(self) -> dict[str, Any]:
        """Greedy accuracy on the held-out problems."""
        return greedy_accuracy(self.model, self.tokenizer, self.task, self.settings.max_new_tokens)


def greedy_accuracy(
    model: Transformer, tokenizer: Tokenizer, task: Task, max_new_tokens: int
) -> dict[str, Any]:
    """Mean reward of greedy answers to the held-out problems, their mean length in tokens, and the first few."""
    problems, was_training = task.held_out, model.training
    prompts = [encode_prompt(tokenizer, chat(p.question, "")[:1]) for p in problems]
    model.eval()
    found = generate(model, prompts, max_new_tokens, eos=tokenizer.eos_id).tokens
    model.train(was_training)
    texts = [tokenizer.decode(tokens, skip_special=True) for tokens in found]
    rewards = [task.reward(p.question, text, p.record) for p, text in zip(problems, texts, strict=True)]
    return {
        "accuracy": sum(rewards) / len(rewards),
        "length": sum(map(len, found)) / len(found),
        "problems": len(problems),
        "samples": [
            {"question": p.question, "wanted": p.record["answer"], "answer": text}
            for p, text in zip(problems[:4], texts, strict=False)
        ],
    }


def _grouped(outputs: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    return [outputs[i : i + size] for i in range(0, len(outputs), size)]


# --- packed outputs ------------------------------------------------------------------------------------------------


@dataclass
class PackedOutputs:
    """Some rollouts side by side in rows, mutually invisible.

    output: int64 [T], of every output token in the order of `batch`'s labels, which rollout of the step it belongs to. sampled: fp32
    [T], the sampler's log-probabilities. routes: int16 [layers, B * S, k]. old, reference: fp32 [T] when they are known.
    """

    batch: Batch
    output: torch.Tensor
    sampled: torch.Tensor
    routes: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> PackedOutputs:
        """The same on another device."""
        moved = [t.to(device) for t in (self.output, self.sampled, self.routes)]
        return PackedOutputs(self.batch.to(device), *moved)


def pack_outputs(
    outputs: Sequence[Rollout], which: Sequence[int], row: int, pad: int, micro_batch: int = 0
) -> list[PackedOutputs]:
    """The rollouts `which` in rows of `row` fed tokens, `micro_batch` rows at a time (0: all at once)."""
    samples = [
        ChatSample(
            [*outputs[i].prompt, *outputs[i].tokens],
            [False] * len(outputs[i].prompt) + [True] * len(outputs[i].tokens),
        )
        for i in which
    ]
    rows = fill_rows([len(sample) for sample in samples], row + 1)
    size = micro_batch or len(rows)
    packs = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        layers, _, k = outputs[which[0]].routes.shape
        routes = torch.full((layers, len(some), row, k), FREE, dtype=torch.int16)
        for r, indices in enumerate(some):
            at = 0
            for index in indices:
                taken = outputs[which[index]].routes
                routes[:, r, at : at + taken.shape[1]] = taken
                at += len(samples[index])
        order = [which[index] for indices in some for index in indices]
        owner = torch.tensor([i for i in order for _ in outputs[i].tokens])
        sampled = torch.cat([outputs[i].logprobs for i in order])
        packs.append(PackedOutputs(pack_rows(samples, some, row, pad), owner, sampled, routes.flatten(1, 2)))
    return packs


def token_logprobs(
    model: Transformer,
    pack: PackedOutputs,
    temperature: float,
    *,
    replay: bool,
    entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability [T] of every output token, differentiable; adds the entropies of their distributions to `entropy`."""
    batch = pack.batch
    with replaying(model, pack.routes if replay and main_routers(model) else None):
        hidden = model(batch.inputs, batch.positions, batch.cu_seqlens).flatten(0, 1)
    mask = batch.loss_mask.flatten()
    hidden = hidden[mask]
    if temperature != 1:
        hidden = hidden / temperature
    labels = batch.labels.flatten()[mask]
    assert not bool((labels == IGNORED).any())
    if entropy is not None:
        with torch.no_grad():
            for part in hidden.split(ENTROPY_ROWS):
                scores = torch.log_softmax(model.head(part).float(), -1)
                entropy -= (scores.exp() * scores).sum()
    return -linear_cross_entropy(hidden, model.head.weight, labels, reduction="none")
