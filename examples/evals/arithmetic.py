"""Arithmetic with exact checking: reasoning_gym's generators, every answer of theirs checked before it is asked.

basic_arithmetic is limited to + - *: with division some of its answers are wrong in the pinned version (the corpus does the
same, `examples.data.builtin`). The seed is not the corpus'; small problems can still occur in both, so `exclude` takes the
questions that were trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from examples.data.builtin import MATHS_SEED, MATHS_SETTINGS
from examples.errors import UserError
from examples.evals.statistics import Score, score
from examples.rewards.expression import NotMaths, parse
from examples.rewards.maths import same_answer
from examples.rewards.rules import boxed_answer

TASKS = ("basic_arithmetic", "chain_sum")
EVAL_SEED = MATHS_SEED + 1
Answer = Callable[[Sequence[str]], list[str]]  # prompts -> continuations

_EXPRESSION = re.compile(r"[-(\d][-+*/()\d\s.]*")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+|/\d+)?")


@dataclass(frozen=True)
class Question:
    """A question in words and its exact answer."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """As the corpus writes it."""
        return f"Question: {self.question}\nAnswer:"


def questions(
    task: str, count: int, *, seed: int = EVAL_SEED, exclude: Collection[str] = (), **settings: Any
) -> list[Question]:
    """`count` different questions. settings: of the generator (`max_digits=1`, `max_terms=3`, ...)."""
    if task not in TASKS:
        raise UserError(f"arithmetic task: must be one of {', '.join(TASKS)}; got {task!r}")
    if count < 1:
        raise UserError(f"arithmetic count: must be at least 1; got {count}")
    import reasoning_gym  # about 1 s: only here

    tried = 20 * count + 100
    settings = {**MATHS_SETTINGS.get(task, {}), **settings}
    dataset = reasoning_gym.create_dataset(task, size=tried, seed=seed, **settings)
    seen, found = set(exclude), []
    for index in range(tried):
        item = dataset[index]
        question, answer = item["question"].strip(), str(item["answer"]).strip()
        if question in seen or not answer_is_right(question, answer):
            continue
        seen.add(question)
        found.append(Question(question, answer))
        if len(found) == count:
            return found
    raise UserError(
        f"arithmetic count: {task} with {settings} has only {len(found)} new questions; got {count}"
    )


def answer_is_right(question: str, answer: str) -> bool:
    """Whether the longest formula of the question has that value."""
    formula = max(_EXPRESSION.findall(question), key=len, default="").rstrip(" .=")
    try:
        return parse(formula) == parse(answer)
    except NotMaths:
        return False


def stated_answer(text: str) -> str:
    """What a continuation states: its last \\boxed{}; else its first line, and of a sentence the last number."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    try:
        parse(line.rstrip("."))
    except NotMaths:
        numbers = _NUMBER.findall(line)
        return numbers[-1] if numbers else line
    return line


def evaluate(
    answer: Answer, items: Sequence[Question], name: str = "arithmetic"
) -> tuple[Score, list[dict[str, Any]]]:
    """Ask everything; the score, and per item what was said. Chance is always saying what is right most often."""
    if not items:
        raise UserError(f"{name}: there is no question")
    said = answer([item.prompt for item in items])
    records = [
        {
            "question": item.question,
            "answer": item.answer,
            "said": text,
            "right": same_answer(stated_answer(text), item.answer),
        }
        for item, text in zip(items, said, strict=True)
    ]
    _, most = Counter(item.answer for item in items).most_common(1)[0]
    return score(name, [record["right"] for record in records], most / len(items)), records
