"""Needle in a haystack (report figure 8): is a fact found again, wherever it stands in however long a context?

A grid of context length x depth. Each cell hides a sentence with a number in filler text, asks for the number at the end, and
counts how often greedy decoding gives it. The same fillers and needles are used in every cell, so cells differ in nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.errors import UserError
from examples.evals.statistics import wilson
from examples.evals.text_model import score_continuations
from examples.model.transformer import Transformer
from examples.rollout.generate import generate

_PLACES = (
    "Avalon",
    "Brigadoon",
    "Camelot",
    "Elfland",
    "Hyperborea",
    "Lilliput",
    "Lyonesse",
    "Shangri-La",
    "Utopia",
    "Ys",
)
DIGITS = 3
CHANCE = 1 / (10**DIGITS - 10 ** (DIGITS - 1))  # guessing a number of so many digits


@dataclass(frozen=True)
class Needle:
    """A fact, the beginning of it that asks for it, and the rest."""

    fact: str
    question: str
    answer: str


@dataclass(frozen=True)
class Grid:
    """accuracy, log_p: [lengths][depths], share of needles found and mean log-probability of the answer (which tells
    something where nothing is found). low, high: 95 % interval of `accuracy`. trials: needles per cell."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: list[list[float]]
    low: list[list[float]]
    high: list[list[float]]
    log_p: list[list[float]]
    trials: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what the report draws."""
        return asdict(self)


def make_needles(count: int, seed: int = 0, digits: int = DIGITS) -> list[Needle]:
    """Needles with different numbers."""
    rng = random.Random(seed)
    needles = []
    for number in rng.sample(range(10 ** (digits - 1), 10**digits), count):
        head = f"The secret number of {rng.choice(_PLACES)} is"
        needles.append(Needle(f"\n{head} {number}.\n", f"\n{head}", f" {number}"))
    return needles


def hide(
    filler: Sequence[int], fact: Sequence[int], question: Sequence[int], bos: int, length: int, depth: float
) -> list[int]:
    """A prompt of exactly `length` tokens: bos, filler with the fact at `depth` of it (0: first, 1: last), question."""
    room = length - 1 - len(fact) - len(question)
    if room < 0 or len(filler) < room:
        raise UserError(
            f"needle: a context of {length} needs {max(room, 0)} tokens of filler beside {len(fact) + len(question) + 1} of its own; "
            f"got {len(filler)}"
        )
    place = round(depth * room)
    return [bos, *filler[:place], *fact, *filler[place:room], *question]


def evaluate(
    model: Transformer,
    tokenizer: Any,
    filler: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    needles: Sequence[Needle] | None = None,
    batch_size: int = 8,
) -> Grid:
    """Fill the grid. filler: token ids of held-out text, at least the longest length; needle t starts reading it at another
    place than needle t + 1 if there is enough. lengths: tokens of the prompt, at most max_positions less the answer's."""
    needles = make_needles(4) if needles is None else needles
    if not needles or not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(
            f"needle: needs needles, lengths and depths in [0, 1]; got {len(needles)}, {lengths}, {depths}"
        )
    facts, questions, answers = [], [], []
    for needle in needles:
        facts.append(tokenizer.encode(needle.fact))
        whole, question = tokenizer.encode(needle.question + needle.answer), tokenizer.encode(needle.question)
        if whole[: len(question)] != question:
            raise UserError(f"needle: the tokenizer joins question and answer of {needle.fact!r}")
        questions.append(question)
        answers.append(whole[len(question) :])
    new = max(map(len, answers))
    if max(lengths) + new > model.config.max_positions:
        raise UserError(
            f"needle: lengths must be at most model.max_positions - {new} = {model.config.max_positions - new}; got {max(lengths)}"
        )
    accuracy: list[list[float]] = []
    low: list[list[float]] = []
    high: list[list[float]] = []
    log_p: list[list[float]] = []
    for length in lengths:
        for grid in (accuracy, low, high, log_p):
            grid.append([])
        spare = max(0, len(filler) - length)
        starts = [spare * number // len(needles) for number in range(len(needles))]
        for depth in depths:
            prompts = [
                hide(filler[start:], fact, question, tokenizer.bos_id, length, depth)
                for start, fact, question in zip(starts, facts, questions, strict=True)
            ]
            found = 0
            for at in range(0, len(prompts), batch_size):
                said = generate(model.eval(), prompts[at : at + batch_size], new).tokens
                found += sum(
                    text[: len(answer)] == answer
                    for text, answer in zip(said, answers[at : at + batch_size], strict=True)
                )
            scores = score_continuations(model, list(zip(prompts, answers, strict=True)), batch_size)
            interval = wilson(found, len(needles))
            accuracy[-1].append(found / len(needles))
            low[-1].append(interval[0])
            high[-1].append(interval[1])
            log_p[-1].append(sum(value for value, _ in scores) / len(scores))
    return Grid(tuple(lengths), tuple(depths), accuracy, low, high, log_p, len(needles))
