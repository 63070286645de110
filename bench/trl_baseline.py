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
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.transformers_baseline import build, hf_views_of
from examples.configs import RunConfig, get_config, parse_overrides
from examples.data.chat_pack import ChatRows
from examples.data.chat_sources import load_chats, sums
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.config import Precision
from examples.model.hf import hf_views
from examples.rollout.group import Rollout, sample_groups
from examples.stages.grpo import GrpoTrainer, Task, exact_integer, pack_outputs
from examples.stages.sft import SftTrainer
from examples.train.grpo import advantages, token_weights
from examples.train.runner import Weights

INSTALL = "pip install 'trl==1.16.0' (requirements/optional.txt)"
TOLERANCE = 1e-4
PROBLEMS_SEED = 1


# --- what both sides train on ---------------------------------------------------------------------------------------


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
        grpo=replace(config.grpo, updates=1, minibatches=1, normalization="grpo", max_new_tokens=answer),
    )


def packed_rows(rows: ChatRows, steps: int) -> list[dict[str, list[int]]]:
    """Our rows of the first steps as trl's packed data set has them: tokens, labels (-100: not learnt), lengths of samples.

    Without the padding behind the last sample, which trl's packing does not have either.
    """
    found = []
    for step in range(steps):
        (batch,) = rows.batches(step)
        labels = torch.where(batch.loss_mask, batch.tokens[:, 1:], -100).tolist()
        for tokens, wanted, positions in zip(batch.tokens.tolist(), labels, batch.positions, strict=True):
            end = tokens.index(rows.pad) if rows.pad in tokens else len(tokens)
            cuts = [at for at in (positions == 0).nonzero()[:, 0].tolist() if at < end] + [end]
            found.append(
                {
                    "input_ids": tokens[:end],
                    "labels": [-100, *wanted][:end],
                    "seq_lengths": [b - a for a, b in itertools.pairwise(cuts)],
                }
            )
    return found


def padded_steps(packed: Sequence[dict[str, list[int]]], per_step: int) -> list[dict[str, list[list[int]]]]:
    """The same samples one by one: an item holds those of a whole step, as how many there are differs."""
    items = []
    for start in range(0, len(packed), per_step):
        item: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row in packed[start : start + per_step]:
            for begin, end in itertools.pairwise(itertools.accumulate(row["seq_lengths"], initial=0)):
                item["input_ids"].append(row["input_ids"][begin:end])
                item["labels"].append(row["labels"][begin:end])
        items.append(item)
    return items


# --- turns ---------------------------------------------------------------------------------------------------------


class Turns:
    """Times, losses and rates of both sides, step by step. The first step of each warms up and is not reported."""

    def __init__(self, threads: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.times: dict[str, list[float]] = {"ours": [], "trl": []}
        self.tokens: dict[str, list[int]] = {"ours": [], "trl": []}
        self.losses: dict[str, list[float]] = {"ours": [], "trl": []}
        self.rates: dict[str, list[float]] = {"ours": [], "trl": []}

    def callback(self, ours: Callable[[], dict[str, Any]]) -> Any:
        """For trl's trainer: after each of its steps, ours takes one."""
        from transformers import TrainerCallback

        turns = self

        class TakeTurns(TrainerCallback):
            start = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.start = turns.clock()

            def on_pre_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
                turns.rates["trl"].append(optimizer.param_groups[0]["lr"])

            def on_step_end(self, *_: Any, **__: Any) -> None:
                middle = turns.clock()
                metrics = ours()
                turns.times["trl"].append(middle - self.start)
                turns.times["ours"].append(turns.clock() - middle)
                turns.rates["ours"].append(metrics["lr"])
                turns.losses["ours"].append(metrics.get("loss", float("nan")))
                self.start = turns.clock()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    turns.losses["trl"].append(logs["loss"])

        return TakeTurns()

    def run(self, trainer: Any) -> None:
        """trl's loop to its end, without a line for each step."""
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def summary(self) -> dict[str, Any]:
        """Tokens per second, medians of the turns, and trl's time per token over ours in each turn."""
        rate = {
            name: [n / t for n, t in zip(self.tokens[name], times, strict=True)][1:]
            for name, times in self.times.items()
        }
        ratios = [a / b for a, b in zip(rate["ours"], rate["trl"], strict=True)]
        return {
            "ours_tokens_per_s": statistics.median(rate["ours"]),
            "trl_tokens_per_s": statistics.median(rate["trl"]),
            "ratio": statistics.median(ratios),
            "ratio_worst_turn": min(ratios),
            "turns": len(ratios),
            "ratios": ratios,
        }


def common_arguments(folder: Path, steps: int, precision: Precision) -> dict[str, Any]:
    """What both of trl's trainers get. Everything else is their default."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "use_cpu": True,
        "bf16": precision == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def adamw_arguments(config: Any) -> dict[str, Any]:
    """Our optimizer's settings in transformers' names."""
    return {
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "adam_epsilon": config.eps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
    }


# --- supervised fine-tuning ------------------------------------------------------------------------------------------


def sft(
    config: RunConfig,
    folder: Path,
    weights: Weights,
    tokenizer: Tokenizer,
    form: str,
    steps: int,
    threads: int,
) -> dict[str, Any]:
    """Both trainers on the same samples; trl's in its `form`, "packed" or "padded"."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    chats = load_chats(config.sft.sources, config.sft.counts, seed=config.sft.seed)
    ours = SftTrainer(config, folder / "none", weights, tokenizer, chats, {})
    if steps >= ours.rows.steps_per_epoch:
        raise UserError(f"steps: must be below {ours.rows.steps_per_epoch}, one epoch; got {steps}")
    ours.total_steps = steps + 1  # transformers' cosine would end one step later than ours
    rows = packed_rows(ours.rows, steps)
    real = [len(row["input_ids"]) for row in rows]
    batch = config.sft.batch_size
    collator = None
    if form == "padded":
        inner = DataCollatorForLanguageModeling(tokenizer.pad_id)

        def collator(items: list[dict[str, Any]]) -> dict[str, Any]:
            (item,) = items
            pairs = zip(item["input_ids"], item["labels"], strict=True)
            return inner([{"input_ids": tokens, "labels": labels} for tokens, labels in pairs])

    arguments = SFTConfig(
        **common_arguments(folder, steps, config.model.precision),
        **adamw_arguments(config.sft.optimizer),
        per_device_train_batch_size=1 if collator else batch,
        train_sampling_strategy="sequential",
        learning_rate=config.sft.schedule.peak,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.sft.schedule.final},
        packing=collator is None,
        max_length=ours.rows.seq_len + 1,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )
    turns = Turns(threads)
    theirs = SFTTrainer(
        str(folder / "hf"),
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list(padded_steps(rows, batch) if collator else rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "hf"),
        callbacks=[turns.callback(ours.train_step)],
    )
    turns.run(theirs)
    turns.tokens = dict.fromkeys(turns.tokens, [sum(real[i : i + batch]) for i in range(0, len(real), batch)])
    gaps = [abs(a - b) for a, b in zip(turns.losses["ours"], turns.losses["trl"], strict=True)]
    rates = [abs(a - b) / b for a, b in zip(turns.rates["ours"], turns.rates["trl"], strict=True)]
    if max(rates) > 1e-6:
        raise UserError(f"rates: must be equal on both sides; got {turns.rates}")
    return turns.summary() | {"loss_gap": max(gaps), "losses": turns.losses}


# --- reinforcement learning ------------------------------------------------------------------------------------------


def grpo_trainers(
    config: RunConfig, folder: Path, weights: Weights, tokenizer: Tokenizer, steps: int, turns: Turns
) -> tuple[GrpoTrainer, Any]:
    """Both trainers; each step sees all questions of the task."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    c = config.grpo
    problems = sums(c.prompts, PROBLEMS_SEED)
    ours = GrpoTrainer(
        config, folder / "none", weights, tokenizer, Task("sums", problems, problems, exact_integer)
    )
    length = {p.question: len(tokens) for p, tokens in zip(problems, ours.prompts, strict=True)}

    def reward(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        asked = [messages[-1]["content"] for messages in prompts]
        turns.tokens["trl"].append(
            sum(map(len, completion_ids)) + sum(length[question] for question in asked)
        )
        return [
            exact_integer(question, messages[0]["content"], {"answer": wanted})
            for question, messages, wanted in zip(asked, completions, answer, strict=True)
        ]

    arguments = GRPOConfig(
        **common_arguments(folder, steps, config.model.precision),
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
    questions = [
        {"prompt": [{"role": "user", "content": p.question}], "answer": p.record["answer"]} for p in problems
    ]

    def step() -> dict[str, Any]:
        before = ours.tokens
        metrics = ours.train_step()
        turns.tokens["ours"].append(ours.tokens - before)
        return metrics

    theirs = GRPOTrainer(
        str(folder / "hf"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(questions * steps),
        processing_class=AutoTokenizer.from_pretrained(folder / "hf"),
        callbacks=[turns.callback(step)],
    )
    return ours, theirs


def grpo(
    config: RunConfig, folder: Path, weights: Weights, tokenizer: Tokenizer, steps: int, threads: int
) -> dict[str, Any]:
    """Both trainers on the same questions."""
    turns = Turns(threads)
    _, theirs = grpo_trainers(config, folder, weights, tokenizer, steps, turns)
    turns.run(theirs)
    return turns.summary()


def grpo_formula(config: RunConfig, folder: Path, weights: Weights, tokenizer: Tokenizer) -> dict[str, float]:
    """Loss and gradient of both for the same outputs, advantages, old and reference log-probabilities.

    Rewards are drawn and log-probabilities moved, so that every term counts: ratios that clip and ratios that do not, both signs
    of the advantage, KL. The gradient's gap is the largest over all weights, relative to the largest gradient.
    """
    c = config.grpo
    ours, theirs = grpo_trainers(config, folder, weights, tokenizer, 1, Turns(1))
    outputs = sample_groups(
        ours.model, ours.prompts, c.group, c.max_new_tokens, eos=tokenizer.eos_id, temperature=c.temperature
    )
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (c.prompts, c.group), generator=generator).double()
    advantage = advantages(rewards)[0].flatten()
    old, reference = (
        [o.logprobs + scale * torch.randn(len(o.tokens), generator=generator) for o in outputs]
        for scale in (0.2, 0.4)
    )

    def packed(logprobs: list[torch.Tensor]) -> Any:
        moved = [replace(o, logprobs=values) for o, values in zip(outputs, logprobs, strict=True)]
        (pack,) = pack_outputs(moved, range(len(moved)), ours.row, tokenizer.pad_id)
        return pack

    pack = packed(old)
    pack.old, pack.reference = pack.sampled, packed(reference).sampled
    lengths = torch.tensor([len(o.tokens) for o in outputs])
    result, *_ = ours.backward(pack, advantage, token_weights(lengths, ours.kind, c.max_new_tokens))
    gradient = hf_views(config.model, ours.optimizer.grads)

    model = theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1  # its loop sets it
    loss = theirs.compute_loss(model, trl_inputs(outputs, advantage, old, reference, tokenizer.pad_id))
    loss.backward()
    wanted = hf_views_of({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert wanted.keys() == gradient.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    gap = max(float((gradient[name] - g).abs().max()) for name, g in wanted.items())
    return {
        "loss_gap": abs(float(result.loss.detach() - loss.detach())),
        "gradient_gap": gap / largest,
        "clip_fraction": float(result.clipped) / result.count,
    }


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


# --- command ---------------------------------------------------------------------------------------------------------


def need_trl() -> None:
    """`UserError` with what to install, if it is missing."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"trl: is not installed ({INSTALL}); got {error}") from None


def measure(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """All cases that were asked for, by name."""
    problems = load_chats(("sums", "worked"), (4000, 400))
    texts = [message["content"] for group in problems.values() for chat in group for message in chat]
    tokenizer = Tokenizer.train(texts, config.model.vocab_size)
    result: dict[str, Any] = {}
    for precision in options.precision:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            wanted = settings(config, precision, options.answer[0])
            ours, theirs = build(wanted.model)
            weights = Weights(wanted.model, ours.state_dict(), {})
            theirs.save_pretrained(folder / "hf")
            tokenizer.save(folder / "hf")
            if "sft" in options.only:
                for form in ("packed", "padded"):
                    name = f"sft {precision} {form}"
                    result[name] = sft(
                        wanted, folder, weights, tokenizer, form, options.steps, options.threads
                    )
                    show(name, result[name])
            if "grpo" in options.only:
                if precision == "fp32":
                    result["grpo formula"] = grpo_formula(wanted, folder, weights, tokenizer)
                for answer in options.answer:
                    name = f"grpo {precision} answers of {answer}"
                    longer = settings(config, precision, answer)
                    result[name] = grpo(longer, folder, weights, tokenizer, options.steps, options.threads)
                    show(name, result[name])
    return result


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    rates = f"{row['ours_tokens_per_s']:10.0f}{row['trl_tokens_per_s']:10.0f}"
    gap = f"   loss within {row['loss_gap']:.1e}" if "loss_gap" in row else ""
    print(f"{name:26}{rates}{row['ratio']:8.2f}{row['ratio_worst_turn']:8.2f}{gap}", flush=True)
    print(f"{'':26}turns {' '.join(f'{ratio:.2f}' for ratio in row['ratios'])}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = argparse.ArgumentParser(prog="python -m bench.trl_baseline", description=__doc__)
    arguments.add_argument("name", nargs="?", default="tiny", help="configuration")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    arguments.add_argument("--only", nargs="+", choices=("sft", "grpo"), default=["sft", "grpo"])
    arguments.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments.add_argument("--answer", type=int, nargs="+", default=[6, 48], help="longest answers of GRPO")
    arguments.add_argument("--steps", type=int, default=16, help="of each case, the first to warm up")
    arguments.add_argument("--quick", action="store_true", help="fp32, short answers, 11 steps")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--json", type=Path, help="also write the result here")
    options = arguments.parse_intermixed_args(argv)
    if options.quick:
        options.precision, options.answer, options.steps = ["fp32"], options.answer[:1], 11
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
    if "grpo formula" in cases:
        print("grpo, same outputs: " + ", ".join(f"{k} {v:.1e}" for k, v in cases["grpo formula"].items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"config": options.name, "overrides": options.overrides, "threads": options.threads}
        options.json.write_text(json.dumps({**record, "versions": versions, "cases": cases}, indent=2) + "\n")
    wrong = [
        name
        for name, row in cases.items()
        if max(row.get("loss_gap", 0) * ("bf16" not in name), row.get("gradient_gap", 0)) > TOLERANCE
    ]
    if wrong:
        print(f"error: {', '.join(wrong)}: the two sides differ by more than {TOLERANCE}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
