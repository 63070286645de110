"""Multiple choice by log-likelihood: the choice that the model finds most probable after the question is its answer.

A base model is not asked for a letter, for it need not know what letters are for. `value` compares sums; `normalised` compares
them per byte, so that a short choice has no advantage (both are what lm-eval reports, as acc and acc_norm).

    {"question": "...", "choices": ["...", "..."], "answer": 0}        one line of a user's JSONL
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.data.files import disk_errors
from examples.errors import UserError
from examples.evals.arithmetic import Question
from examples.evals.statistics import Score, score

LogLikelihood = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]


@dataclass(frozen=True)
class ChoiceQuestion:
    """context: all that comes before the choice. answer: index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"multiple choice: needs 2 choices or more and the index of one of them; got {len(self.choices)}, {self.answer}"
            )
        if len(set(self.choices)) < len(self.choices) or not all(self.choices):
            raise UserError(
                f"multiple choice: choices must differ and not be empty; got {list(self.choices)}"
            )


def read_questions(path: Path) -> list[ChoiceQuestion]:
    """From JSONL; an error names the line."""
    with disk_errors(path, "reading"):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, choices, answer = record["question"], record["choices"], record["answer"]
            valid = (
                isinstance(question, str)
                and isinstance(answer, int)
                and all(isinstance(c, str) for c in choices)
            )
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: must be an object with question, choices, answer; got {error!r}"
            ) from None
        if not valid:
            raise UserError(
                f"{path}:{number}: question and choices must be strings, answer an index; got {line[:80]}"
            )
        try:
            context = f"Question: {question.strip()}\nAnswer:"
            found.append(
                ChoiceQuestion(context, tuple(f" {c.strip()}" if c.strip() else "" for c in choices), answer)
            )
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not found:
        raise UserError(f"{path}: there is no question in it")
    return found


def cloze_questions(
    documents: Sequence[str],
    count: int,
    *,
    choices: int = 4,
    context: int = 200,
    ending: int = 60,
    seed: int = 0,
) -> list[ChoiceQuestion]:
    """How does this held-out text go on? The right ending, and endings cut from other documents, in characters."""
    long_enough = [text for text in documents if len(text) >= context + ending]
    if len(long_enough) < choices:
        raise UserError(
            f"cloze questions: need {choices} documents of {context + ending} characters; got {len(long_enough)}"
        )
    rng = random.Random(seed)
    found: list[ChoiceQuestion] = []
    for _ in range(20 * count):
        texts = rng.sample(long_enough, choices)
        starts = [rng.randrange(len(text) - context - ending + 1) for text in texts]
        endings = [text[start + context :][:ending] for text, start in zip(texts, starts, strict=True)]
        if len(set(endings)) < choices:
            continue
        answer = rng.randrange(choices)
        endings[0], endings[answer] = endings[answer], endings[0]
        found.append(ChoiceQuestion(texts[0][starts[0] :][:context], tuple(endings), answer))
        if len(found) == count:
            return found
    raise UserError(f"cloze questions: the documents are too alike for {count}; got {len(found)}")


def arithmetic_choices(items: Sequence[Question], *, choices: int = 4, seed: int = 0) -> list[ChoiceQuestion]:
    """The right whole number among near ones."""
    rng = random.Random(seed)
    found = []
    for item in items:
        right = int(item.answer)
        near = [right + delta for delta in (-10, -3, -2, -1, 1, 2, 3, 10)]
        numbers = [*rng.sample(near, choices - 1), right]
        rng.shuffle(numbers)
        found.append(ChoiceQuestion(item.prompt, tuple(f" {n}" for n in numbers), numbers.index(right)))
    return found


def evaluate(
    loglikelihood: LogLikelihood, items: Sequence[ChoiceQuestion], name: str = "multiple choice"
) -> tuple[Score, Score]:
    """(by sum, by mean per byte), each with the chance level of these questions."""
    if not items:
        raise UserError(f"{name}: there is no question")
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    scores = iter(loglikelihood(pairs))
    by_sum, by_byte = [], []
    for item in items:
        sums = [next(scores)[0] for _ in item.choices]
        means = [value / len(choice.encode()) for value, choice in zip(sums, item.choices, strict=True)]
        by_sum.append(sums.index(max(sums)) == item.answer)
        by_byte.append(means.index(max(means)) == item.answer)
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return score(name, by_sum, chance), score(f"{name}, per byte", by_byte, chance)
