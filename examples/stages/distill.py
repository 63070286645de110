"""Distillation of a domain expert (report section 5.1): sample, reject, fine-tune.

The expert is asked each problem under a system prompt that calls for reflection and verification, several times and at high
temperature. The verifier rejects what is wrong or unfinished, style control what is badly written; of the rest the
shortest are kept, for length is what the report found wrong with R1's. Each kept answer becomes two samples, with the system
prompt and without, so that the student answers as the expert does whether it is told to or not. (The report's other pair,
problem and original response, is what the student has learnt already, in stage `sft`.)

The expert at this scale is our own GRPO policy, not R1: it has the answers, and no reflection to speak of.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from examples.configs import RunConfig
from examples.data.chat import chat, encode_prompt, read_chats
from examples.data.chat_sources import Problem
from examples.data.files import write_atomic
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rewards.style import StyleLimits, faults
from examples.rollout.group import Rollout, sample_groups
from examples.stages.sft import SftTrainer, split
from examples.stages.stage import Context, read_done, write_json
from examples.stages.tasks import Task, greedy_accuracy, make_verified
from examples.stages.tokenize import tokenizer_path
from examples.train.runner import start_weights

PROMPTS_AT_ONCE = 64
PROGRESS_SECONDS = 5.0
REASONS = ("kept", "wrong", "unfinished", "badly written", "repeated", "longer than those kept")

Messages = list[dict[str, str]]


def run(context: Context) -> dict[str, Any]:
    """Sample from `distill.teacher`, fine-tune `distill.student`; returns the table."""
    config = context.config.distill
    tokenizer = Tokenizer.load(tokenizer_path(context.root))
    task = make_verified(context.config)
    data, record = context.folder / "distilled.jsonl", context.folder / "rejection.json"
    if not record.exists():  # written after the data: both are there, or sampling starts again
        teacher = start_weights(context.root / config.teacher).build().eval()
        chats, table = sample(teacher, tokenizer, task, context.config)
        write_atomic(data, b"".join(json.dumps({"messages": m}).encode() + b"\n" for m in chats))
        write_json(record, table)
    table = json.loads(record.read_text())
    print(f"  {table['answers']} answers: " + ", ".join(f"{table[r]} {r}" for r in REASONS), flush=True)
    train, held_out = split({"distilled": list(read_chats(data))}, context.config.sft.held_out_every)
    weights = start_weights(context.root / config.student)
    limit = config.max_new_tokens
    before = greedy_accuracy(weights.build(), tokenizer, task, limit)
    trainer = SftTrainer(context.config, context.folder, weights, tokenizer, train, held_out)
    first, last = trainer.run()
    after = greedy_accuracy(trainer.model, tokenizer, task, limit)
    asked = greedy_accuracy(trainer.model, tokenizer, task, limit, config.system)
    expert = read_done(context.root, config.teacher)
    rows = [("student before", before), ("student after", after), ("asked to reflect", asked)]
    if expert and "accuracy" in expert["result"].get("after", {}):
        rows.append(("expert", expert["result"]["after"]))
    print(f"  {'greedy, held out':18}accuracy  length", flush=True)
    for name, row in rows:
        print(f"  {name:18}{row['accuracy']:8.3f}{row.get('length', float('nan')):8.2f}", flush=True)
    return {
        "rejection": table,
        "before": before,
        "after": after,
        "asked_to_reflect": asked,
        "held_out_loss": [first["loss"], last["loss"]],
        "steps": trainer.step,
    }


def sample(
    teacher: Transformer, tokenizer: Tokenizer, task: Task, config: RunConfig
) -> tuple[list[Messages], dict[str, Any]]:
    """The conversations to learn from, and what became of the teacher's answers."""
    c = config.distill
    problems = task.train[: c.problems]
    system = [{"role": "system", "content": c.system}] if c.system else []
    prompts = [encode_prompt(tokenizer, [*system, *chat(p.question, "")[:1]]) for p in problems]
    chats: list[Messages] = []
    fates: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    found: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {"drawn": [], "kept": []}
    begin = printed = time.monotonic()
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        outputs = sample_groups(
            teacher,
            some,
            c.samples,
            c.max_new_tokens,
            eos=tokenizer.eos_id,
            temperature=c.temperature,
            seed=c.seed * 1_000_003 + start,
        )
        for number in range(len(some)):
            problem = problems[start + number]
            group = outputs[number * c.samples : (number + 1) * c.samples]
            lengths["drawn"] += [len(output.tokens) for output in group]
            kept, why, bad = select(tokenizer, task, problem, group, c.keep, c.style)
            fates.update(why)  # + would drop what is 0
            found.update(bad)
            lengths["kept"] += [len(output.tokens) for output, _ in kept]
            for _, text in kept:
                chats += [chat(problem.question, text, c.system), chat(problem.question, text)]
        if time.monotonic() - printed > PROGRESS_SECONDS:
            printed = time.monotonic()
            done = min(start + PROMPTS_AT_ONCE, len(prompts))
            left = (printed - begin) / done * (len(prompts) - done)
            print(f"  {done}/{len(prompts)} problems, ETA {left:.0f} s", flush=True)
    if not chats:
        raise UserError(
            f"distill: none of {len(lengths['drawn'])} answers of the expert is right and well written: {dict(fates)}"
        )
    mean = {f"mean_length_{name}": sum(n) / len(n) for name, n in lengths.items()}
    counts = {"problems": len(problems), "answers": len(lengths["drawn"]), **fates}
    return chats, counts | {"faults": dict(found), **mean}


def select(
    tokenizer: Tokenizer,
    task: Task,
    problem: Problem,
    outputs: Sequence[Rollout],
    keep: int,
    style: StyleLimits,
) -> tuple[list[tuple[Rollout, str]], Counter[str], Counter[str]]:
    """The answers to keep, shortest first, with their texts; how many of all had each fate; and which faults of style."""
    fates: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    found: Counter[str] = Counter()
    right: dict[str, Rollout] = {}
    for output in sorted(outputs, key=lambda output: len(output.tokens)):
        text = tokenizer.decode(output.tokens, skip_special=True)
        if not output.ended:
            fates["unfinished"] += 1
        elif task.verifier(problem.question, text, problem.answer) < 1:
            fates["wrong"] += 1
        elif bad := faults(problem.question, text, style):
            fates["badly written"] += 1
            found.update(bad)
        elif text in right:
            fates["repeated"] += 1
        else:
            right[text] = output
    kept = [(output, text) for text, output in right.items()][:keep]
    fates["kept"] = len(kept)
    fates["longer than those kept"] = len(right) - len(kept)
    return kept, fates, found
