"""The final evaluation (report sections 4.4, 5.3): every model of the run on the same items, each score with its interval.

The base model is asked in the form of the corpus, fine-tuned ones in the form of a chat; text, choices, programs and needles are the
same for all. A score that guessing explains is labelled "near chance"; a task that cannot be done here says why. Each (model,
task) is a file of its own, so that a run that was stopped keeps what it has, and a model that was trained again is asked again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from examples.configs import RunConfig
from examples.data.chat import chat, encode_prompt
from examples.data.shards import ShardReader
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.evals import arithmetic, humaneval, multiple_choice, needle
from examples.evals.arithmetic import Question
from examples.evals.perplexity import text_score
from examples.evals.statistics import share
from examples.evals.text_model import TextModel
from examples.model.transformer import Transformer
from examples.rewards.sandbox import Sandbox
from examples.rollout.generate import generate
from examples.stages.stage import Context, read_done, write_json
from examples.stages.tasks import make_verified
from examples.stages.tokenize import open_data
from examples.train.checkpoint import list_checkpoints
from examples.train.runner import start_weights

BASE = ("pretrain", "extend")  # stages whose models have never seen a chat
ANSWER_TOKENS = 12  # a number and its end
# Two-digit sums in words: the corpus and SFT's worked maths have them.
IN_WORDS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}

Row = dict[str, Any]


def run(context: Context) -> dict[str, Any]:
    """Evaluate every stage of `benchmarks.models` that has finished."""
    config = context.config.benchmarks
    tokenizer, _, readers = open_data(context.root)
    present = [name for name in config.models if read_done(context.root, name) is not None]
    absent = [name for name in config.models if name not in present]
    if not present:
        raise UserError(
            f"benchmarks.models: none of {', '.join(config.models)} has finished in {context.root}"
        )
    tasks = Tasks(context.config, tokenizer, readers)
    rows: list[Row] = []
    begin = time.monotonic()
    for number, name in enumerate(present):
        mark = checkpoint_mark(context.root / name)
        model: Transformer | None = None  # built when a task asks for it
        for task in config.tasks:
            path = context.folder / "scores" / f"{name}.{task}.json"
            found = kept(path, mark)
            if found is None:
                model = model or start_weights(context.root / name).build().eval()
                found = tasks.scores(task, model, is_chat=name not in BASE)
                write_json(path, {"checkpoint": mark, "scores": found})
            rows += [{"model": name, "task": task, **row} for row in found]
        done = number + 1
        left = (time.monotonic() - begin) / done * (len(present) - done)
        print(f"  {name}: {done}/{len(present)} models, ETA {left:.0f} s", flush=True)
    print(table(rows, present), flush=True)
    if absent:
        print(f"  not there: {', '.join(absent)} (stages that have not run)", flush=True)
    return {"models": present, "absent": absent, "scores": rows}


def checkpoint_mark(folder: Path) -> str:
    """What tells the newest checkpoint of a stage from any other: the checksum of its manifest."""
    found = list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: must hold a checkpoint to evaluate; got none; run that stage again")
    return json.loads((found[-1] / "manifest.json").read_text())["sha256"]


def kept(path: Path, mark: str) -> list[Row] | None:
    """The scores of a finished (model, task), unless the model is another one now or the task could not be done then."""
    try:
        record = json.loads(path.read_text())
        valid = record["checkpoint"] == mark and not any("why" in row for row in record["scores"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a record of this stage; got {error!r}; delete it") from None
    return record["scores"] if valid else None


def table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """One line for each score, one column for each model: value [interval]; "~" marks what is near chance."""
    names = list(dict.fromkeys((row["task"], row["name"]) for row in rows))
    cells = {(row["task"], row["name"], row["model"]): row for row in rows}
    lines = [f"  {'':26}{'chance':>8}  " + "".join(f"{model:24}" for model in models)]
    whys = []
    for task, name in names:
        line, chance = "", ""
        for model in models:
            row = cells.get((task, name, model))
            if row is None:
                line += f"{'':24}"
            elif "why" in row:
                line += f"{'not done':24}"
                whys.append(f"  {task}, {model}: {row['why']}")
            else:
                near = "~" if row["near_chance"] else " "
                line += f"{near}{row['value']:6.3f} [{row['low']:.3f}, {row['high']:.3f}] "
                chance = f"{row['chance']:.3f}" if row["chance"] else ""
        lines.append(f"  {name:26}{chance:>8}  {line}".rstrip())
    return "\n".join([*lines, "  ~ near chance: guessing explains it", *dict.fromkeys(whys)])


class Tasks:
    """The items of every task, made once and asked of every model. What is read from the user's files is read at once, before
    any work."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, readers: dict[str, ShardReader]) -> None:
        self.settings = c = config.benchmarks
        self.tokenizer, self.readers = tokenizer, readers
        self.positions = config.model.max_positions
        self.task = make_verified(config)
        self.problems: Sequence[humaneval.Problem] = humaneval.OWN
        if c.code_problems:
            self.problems = humaneval.read_problems(Path(c.code_problems))
        self.own_choices = (
            multiple_choice.read_questions(Path(c.choice_questions)) if c.choice_questions else None
        )

    def scores(self, task: str, model: Transformer, *, is_chat: bool) -> list[Row]:
        """What a model gets in a task; or one row that says why it cannot be done."""
        run_task: Callable[[TextModel, bool], list[Row]] = getattr(self, f"_{task}")
        text = TextModel(model, self.tokenizer, batch_size=self.settings.batch_size)
        try:
            return run_task(text, is_chat)
        except UserError as error:
            return [{"name": task, "why": str(error)}]

    @cached_property
    def documents(self) -> dict[str, list[list[int]]]:
        """The first held-out documents of each source, as ids without special tokens."""
        special = set(self.tokenizer.special_ids.values())
        count = self.settings.documents
        return {
            name: [
                [int(i) for i in reader.document(number) if int(i) not in special]
                for number in range(min(len(reader), count))
            ]
            for name, reader in self.readers.items()
        }

    def _text(self, text: TextModel, is_chat: bool) -> list[Row]:
        """Bits per byte of held-out documents."""
        documents = {
            name: [ids[: self.settings.document_tokens] for ids in group if ids]
            for name, group in self.documents.items()
        }
        return [text_score(text, documents)]

    def _cloze(self, text: TextModel, is_chat: bool) -> list[Row]:
        """How does a held-out text go on? Of four endings, the most probable."""
        items = self.own_choices
        if items is None:
            texts = [self.tokenizer.decode(ids) for group in self.documents.values() for ids in group]
            items = multiple_choice.cloze_questions(texts, self.settings.cloze, seed=self.settings.seed)
        return [_row(s) for s in multiple_choice.evaluate(text.loglikelihood, items, "choices")]

    def _verified(self, text: TextModel, is_chat: bool) -> list[Row]:
        """Held-out problems of the task that GRPO learns, greedy, judged by its verifier; chance: one answer to all."""
        task = self.task
        problems = task.held_out[: self.settings.verified]
        items = [Question(p.question, p.answer) for p in problems]
        said = self._answers(text, is_chat, items)([item.prompt for item in items])
        stated = (
            said if is_chat else [arithmetic.stated_answer(answer) for answer in said]
        )  # a base model goes on
        right = [
            task.verifier(p.question, answer, p.answer) for p, answer in zip(problems, stated, strict=True)
        ]
        (_, commonest), *_ = Counter(p.answer for p in problems).most_common(1)
        shown = [
            {"question": p.question, "answer": p.answer, "said": answer}
            for p, answer in zip(problems[:4], said, strict=False)
        ]
        found = share(task.name, sum(value >= 1 for value in right), len(problems), commonest / len(problems))
        return [_row(found) | {"samples": shown}]

    def _arithmetic(self, text: TextModel, is_chat: bool) -> list[Row]:
        """Sums of two numbers in words, greedy."""
        seed = arithmetic.EVAL_SEED + self.settings.seed
        items = arithmetic.questions("chain_sum", self.settings.arithmetic, seed=seed, **IN_WORDS)
        return self._exact(text, is_chat, items, "sums in words")

    @staticmethod
    def _answers(text: TextModel, is_chat: bool, items: Sequence[Question]) -> Callable[..., list[str]]:
        """Answers to prompts, which are those of `items`: a chat is asked the questions instead."""

        def answer(prompts: Sequence[str]) -> list[str]:
            if is_chat:
                return chat_answers(text, [item.question for item in items], ANSWER_TOKENS)
            return text.generate_until(prompts, (), ANSWER_TOKENS)

        return answer

    def _exact(self, text: TextModel, is_chat: bool, items: Sequence[Question], name: str) -> list[Row]:
        result, records = arithmetic.evaluate(self._answers(text, is_chat, items), items, name)
        shown = [{key: record[key] for key in ("question", "answer", "said")} for record in records[:4]]
        return [_row(result) | {"samples": shown}]

    def _code(self, text: TextModel, is_chat: bool) -> list[Row]:
        """HumanEval's format in the sandbox; completions of the prompt as it is."""
        c = self.settings
        sandbox = Sandbox()  # first: it says so where there is none

        def complete(prompts: Sequence[str], number: int) -> list[str]:
            seed = c.seed * 1_000_003 + number
            return text.generate_until(prompts, (), c.code_tokens, temperature=c.code_temperature, seed=seed)

        ks = tuple(dict.fromkeys((1, c.code_k)))
        found = humaneval.evaluate(complete, self.problems, sandbox, samples=c.code_samples, ks=ks)
        count = found["problems"]
        about = {"samples": c.code_samples, "sandbox": sandbox.protection.level, "own": not c.code_problems}
        return [_row(share(f"code pass@{k}", found[f"pass@{k}"] * count, count)) | about for k in ks]

    def _needle(self, text: TextModel, is_chat: bool) -> list[Row]:
        """A number hidden in held-out text, over all lengths and depths."""
        c, whole = (
            self.settings,
            min(text.limit, self.positions),
        )  # the same lengths for a model of extended context
        lengths = sorted({min(whole - ANSWER_TOKENS, round(part * whole)) for part in c.needle_lengths})
        filler = list(chain.from_iterable(chain.from_iterable(self.documents.values())))
        needles = needle.make_needles(c.needles, c.seed)
        grid = needle.evaluate(
            text.model,
            self.tokenizer,
            filler,
            lengths,
            c.needle_depths,
            needles=needles,
            batch_size=text.batch_size,
        )
        count = grid.trials * len(grid.lengths) * len(grid.depths)
        right = sum(value * grid.trials for line in grid.accuracy for value in line)
        return [_row(share("needle", right, count, needle.CHANCE)) | {"grid": grid.to_dict()}]


def _row(score: Any) -> Row:
    return score.to_dict() | {"unit": "share"}


def chat_answers(text: TextModel, questions: Sequence[str], new: int) -> list[str]:
    """Greedy answers in the form of a chat."""
    ids = [encode_prompt(text.tokenizer, chat(question, "")[:1]) for question in questions]
    found: list[str] = []
    for start in range(0, len(ids), text.batch_size):
        drawn = generate(text.model, ids[start : start + text.batch_size], new, eos=text.tokenizer.eos_id)
        found += [text.tokenizer.decode(tokens, skip_special=True) for tokens in drawn.tokens]
    return found
