"""GRPO by both on the same questions, and the same loss and gradient for the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.beside_trl.turns import Start, Turns, adamw_arguments, common_arguments
from bench.transformers_baseline import hf_views_of
from examples.data.chat_sources import sums
from examples.errors import UserError
from examples.model.hf import hf_views
from examples.rewards.rules import number
from examples.rollout.group import Rollout, sample_groups
from examples.stages.grpo import GrpoTrainer, StepBatch
from examples.stages.tasks import Task
from examples.train.grpo import advantages, token_weights
from examples.train.outputs import PackedOutputs, pack_outputs

PROBLEMS_SEED = 1  # of the questions


def grpo_trainers(start: Start, steps: int, turns: Turns) -> tuple[GrpoTrainer, Any]:
    """Both trainers; each step sees all questions of the task."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    c = start.config.grpo
    problems = sums(c.prompts, PROBLEMS_SEED)
    task = Task("sums", problems, problems, number, number)
    ours = GrpoTrainer(start.config, start.folder / "none", start.weights, start.tokenizer, task)
    length = {p.question: len(tokens) for p, tokens in zip(problems, ours.prompts, strict=True)}

    def reward(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        asked = [messages[-1]["content"] for messages in prompts]
        turns.tokens["trl"].append(
            sum(map(len, completion_ids)) + sum(length[question] for question in asked)
        )
        return [
            number(question, messages[0]["content"], wanted)
            for question, messages, wanted in zip(asked, completions, answer, strict=True)
        ]

    arguments = GRPOConfig(
        **common_arguments(start, steps),
        **adamw_arguments(c.optimizer),
        per_device_train_batch_size=c.prompts * c.group,
        num_generations=c.group,
        max_completion_length=c.max_new_tokens,
        temperature=c.temperature,
        learning_rate=c.learning_rate,
        lr_scheduler_type="constant",
        beta=c.beta,
        epsilon=c.clip_low,
        epsilon_high=c.clip_high,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,  # eq. 27 has none
        shuffle_dataset=False,
        router_aux_loss_coef=0.0,
    )
    questions = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems]

    def step() -> dict[str, Any]:
        before = ours.tokens
        metrics = ours.train_step()
        turns.tokens["ours"].append(ours.tokens - before)
        return metrics

    theirs = GRPOTrainer(
        str(start.folder / "hf"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(questions * steps),
        processing_class=AutoTokenizer.from_pretrained(start.folder / "hf"),
        callbacks=[turns.callback(step)],
    )
    asked = theirs.processing_class.apply_chat_template(
        [question["prompt"] for question in questions], add_generation_prompt=True, return_dict=True
    )
    if asked["input_ids"] != ours.prompts:
        raise UserError("grpo: both sides must ask the same tokens; trl's chat template gives others")
    return ours, theirs


def grpo(start: Start, steps: int) -> dict[str, Any]:
    """Both trainers on the same questions."""
    turns = Turns(start.threads)
    _, theirs = grpo_trainers(start, steps, turns)
    turns.run(theirs)
    return turns.summary()


def grpo_formula(start: Start) -> dict[str, float]:
    """Loss and gradient of both for the same outputs, advantages, old and reference log-probabilities.

    Rewards are drawn and log-probabilities moved, so that every term counts: ratios that clip and ratios that do not, both signs
    of the advantage, KL. The gradient's gap is the largest over all weights, relative to the largest gradient.
    """
    c, tokenizer = start.config.grpo, start.tokenizer
    ours, theirs = grpo_trainers(start, 1, Turns(1))
    outputs = sample_groups(
        ours.model, ours.prompts, c.group, c.max_new_tokens, eos=tokenizer.eos_id, temperature=c.temperature
    )
    # An untrained model hardly ever ends: cut, so that means over outputs and over tokens differ.
    outputs = [_cut(output, 1 + i % c.max_new_tokens) for i, output in enumerate(outputs)]
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (c.prompts, c.group), generator=generator).double()
    advantage = advantages(rewards)[0].flatten()
    old, reference = (
        [o.logprobs + scale * torch.randn(len(o.tokens), generator=generator) for o in outputs]
        for scale in (0.2, 0.4)
    )

    def packed(logprobs: list[torch.Tensor]) -> PackedOutputs:
        moved = [replace(o, logprobs=values) for o, values in zip(outputs, logprobs, strict=True)]
        (pack,) = pack_outputs(moved, range(len(moved)), ours.row, tokenizer.pad_id)
        return pack

    pack = packed(old)
    pack.old, pack.reference = pack.sampled, packed(reference).sampled
    lengths = torch.tensor([len(o.tokens) for o in outputs])
    weight = token_weights(lengths, ours.kind, c.max_new_tokens)
    batch = StepBatch(advantage, weight, torch.ones(len(outputs), dtype=torch.int64))
    sums_of_ours = ours.backward(pack, batch, first=True)
    gradient = hf_views(start.config.model, ours.optimizer.grads)

    model = theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1  # its loop sets it
    loss = theirs.compute_loss(model, trl_inputs(outputs, advantage, old, reference, tokenizer.pad_id))
    loss.backward()
    wanted = hf_views_of({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert wanted.keys() == gradient.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    gap = max(float((gradient[name] - g).abs().max()) for name, g in wanted.items())
    return {
        "loss_gap": abs(sums_of_ours["loss"] - float(loss.detach())),
        "gradient_gap": gap / largest,
        "clip_fraction": sums_of_ours["clipped"] / sums_of_ours["terms"],
    }


def _cut(output: Rollout, count: int) -> Rollout:
    """The first `count` tokens of an output, or all if it has fewer."""
    tokens = output.tokens[:count]
    return replace(
        output,
        tokens=tokens,
        logprobs=output.logprobs[:count],
        routes=output.routes[:, : len(output.prompt) + len(tokens) - 1],
    )


def trl_inputs(
    outputs: Sequence[Rollout],
    advantage: torch.Tensor,
    old: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    pad: int,
) -> dict[str, torch.Tensor]:
    """A batch as trl's GRPO has it after generation: questions padded on the left, answers on the right."""

    def left(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])

    def right(rows: Sequence[torch.Tensor], value: float) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    answers = [torch.tensor(o.tokens) for o in outputs]
    return {
        "prompt_ids": left([o.prompt for o in outputs], pad),
        "prompt_mask": left([[1] * len(o.prompt) for o in outputs], 0),
        "completion_ids": right(answers, pad),
        "completion_mask": right([torch.ones_like(answer) for answer in answers], 0),
        "advantages": advantage.float(),
        "old_per_token_logps": right(old, 0.0),
        "ref_per_token_logps": right(reference, 0.0),
    }
