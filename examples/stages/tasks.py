"""What reinforcement learning and distillation solve: problems, the rule that says what is right, the reward to learn from.

A task's verifier and reward are callables of `examples.rewards`, `(prompt, response, reference) -> float`. The verifier alone
decides accuracy and what distillation keeps; a reward may add form, language or a judge to it, by `grpo.rules` and `grpo.judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.configs import RunConfig
from examples.configs.post_training import GrpoConfig
from examples.data.chat import chat, encode_prompt
from examples.data.chat_sources import Problem, read_problems, sorting, sums
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rewards import rules
from examples.rewards.rules import Rule, Weighted
from examples.rollout.generate import generate

POOL = 4096  # generated problems to train on, or as many as distillation asks; drawn from with replacement between steps


@dataclass(frozen=True)
class Task:
    """What is learnt: problems to train on, problems to evaluate with, the verifier (1 or 0), and the reward."""

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    verifier: Rule
    reward: Rule


# Problems of a generated task, (to train on, held out), and the rule that judges their answers.
TASKS: dict[str, tuple[Callable[[GrpoConfig, int], tuple[list[Problem], list[Problem]]], Rule]] = {
    "sums": (
        lambda c, pool: (sums(pool, c.seed + 1), sums(c.eval_prompts, c.seed, held_out=True)),
        rules.number,
    ),
    "sorting": (
        lambda c, pool: (sorting(pool, c.seed + 1), sorting(c.eval_prompts, c.seed, held_out=True)),
        rules.exact,
    ),
}

# What a reward may add to being right, by name.
FORMS: dict[str, Callable[[GrpoConfig], Rule]] = {
    "boxed": lambda c: rules.boxed,
    "tags": lambda c: rules.tags("think", "answer"),
    "reflection": lambda c: rules.reflection,
    "length": lambda c: rules.length(c.longest_words),
    "language": lambda c: rules.language,
}


def make_task(config: RunConfig, judge: Rule | None = None) -> Task:
    """What GRPO learns: the task, with the reward of `grpo.rules` and `grpo.judge`.

    judge: the model-based reward, needed when `grpo.judge` gives it a weight.
    """
    task = make_verified(config)
    return replace(task, reward=make_reward(config.grpo, task.verifier, judge))


def make_verified(config: RunConfig) -> Task:
    """The task of `grpo.task`, or of the user's `grpo.problems`, which the maths rule judges; its reward is its verifier."""
    c = config.grpo
    if c.problems:
        train, held_out = read_problems(c.problems)
        return Task("problems", train, held_out[: c.eval_prompts], rules.maths, rules.maths)
    if c.task not in TASKS:
        raise UserError(f"grpo.task: must be one of {', '.join(TASKS)}; got {c.task!r}")
    problems, verifier = TASKS[c.task]
    pool = max(POOL, config.distill.problems)
    return Task(c.task, *problems(c, pool), verifier, verifier)


def make_reward(c: GrpoConfig, verifier: Rule, judge: Rule | None = None) -> Rule:
    """The verifier, plus the weighted rules of `grpo.rules`, plus the judge; only the verifier if nothing is added."""
    parts: dict[str, tuple[Rule, float]] = {"right": (verifier, 1.0)}
    for name, weight in zip(c.rules, c.rule_weights, strict=True):
        if name not in FORMS:
            raise UserError(f"grpo.rules: must be among {', '.join(FORMS)}; got {name!r}")
        parts[name] = FORMS[name](c), weight
    if c.judge:
        if judge is None:
            raise UserError(f"grpo.judge: must be 0 without a trained judge; got {c.judge}")
        parts["judge"] = judge, c.judge
    return Weighted(parts, gate="right" if c.gate else None) if len(parts) > 1 else verifier


def greedy_accuracy(
    model: Transformer, tokenizer: Tokenizer, task: Task, max_new_tokens: int, system: str = ""
) -> dict[str, Any]:
    """Share of right greedy answers to the held-out problems, their mean length in tokens, and the first few."""
    problems, was_training = task.held_out, model.training
    prompts = [encode_prompt(tokenizer, chat(p.question, "", system)[:-1]) for p in problems]
    model.eval()
    found = generate(model, prompts, max_new_tokens, eos=tokenizer.eos_id).tokens
    model.train(was_training)
    texts = [tokenizer.decode(tokens, skip_special=True) for tokens in found]
    right = [task.verifier(p.question, text, p.answer) for p, text in zip(problems, texts, strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "length": sum(map(len, found)) / len(found),
        "problems": len(problems),
        "samples": [
            {"question": p.question, "wanted": p.answer, "answer": text}
            for p, text in zip(problems[:4], texts, strict=False)
        ],
    }
