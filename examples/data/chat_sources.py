"""Where conversations come from: generated maths, translations, speeches of plays, and the user's own files.

The report fine-tunes on 1.5M undisclosed samples (section 5.1: reasoning data from expert models, the rest from V2.5 and
people). These stand in for them without a download: `sums` and `sorting` are short verifiable problems, the kinds that GRPO
trains on later; `worked` are maths with the worked solution; `translation` are Django's message catalogues; `dialogue` are two
consecutive speeches of a scene. All are registry packages that pre-training reads too.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from examples.configs.post_training import REFLECTION
from examples.data import builtin
from examples.data.chat import chat, json_lines, read_chats
from examples.errors import UserError

Messages = list[dict[str, str]]

# Sums and differences of digits, and how many digits there are to sort.
SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
SORTED_DIGITS = 4
SYSTEM_EVERY = 4  # one verifiable problem in so many is asked under the system prompt that distillation uses
HELD_OUT_EVERY = 8  # a problem is held out by the hash of its text: equal problems fall on the same side
SPEECH_CHARS = 300


@dataclass(frozen=True)
class Problem:
    """A question and its answer: the reference that its verifier compares with."""

    question: str
    answer: str


def is_held_out(question: str, every: int = HELD_OUT_EVERY) -> bool:
    """Whether a problem is for evaluation, by its text alone."""
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little") % every == 0


def sums(count: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """`count` sums of digits (reasoning_gym's chain_sum); held-out ones are all different and never trained on."""
    return _take("sums", _every_sum(seed, 40 * count + 1000), count, held_out)


def sorting(count: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """`count` numbers whose digits are to be sorted; held-out ones are all different and never trained on."""
    return _take("sorting", _every_sorting(seed, 40 * count + 1000), count, held_out)


def _take(name: str, problems: Iterator[Problem], count: int, held_out: bool) -> list[Problem]:
    found = list(itertools.islice(_side(problems, held_out), count))
    if len(found) < count:
        raise UserError(
            f"{name}: there are only {len(found)} different held-out problems; {count} were asked for"
        )
    return found


def _side(problems: Iterator[Problem], held_out: bool) -> Iterator[Problem]:
    """Those that are held out, each once, or those that are not."""
    seen: set[str] = set()
    for problem in problems:
        if is_held_out(problem.question) == held_out and not (held_out and problem.question in seen):
            seen.add(problem.question)
            yield problem


def _every_sum(seed: int, tries: int = 1 << 30) -> Iterator[Problem]:
    import reasoning_gym  # about 1 s: only here

    dataset = reasoning_gym.create_dataset("chain_sum", size=tries, seed=seed, **SUMS)
    for index in range(tries):
        item = dataset[index]
        # The generator's sentence around the expression would be most of a sample.
        yield Problem(f"{item['metadata']['expression']} =", str(item["answer"]))


def _every_sorting(seed: int, tries: int = 1 << 30) -> Iterator[Problem]:
    draw = random.Random(seed)
    for _ in range(tries):
        digits = draw.choices("0123456789", k=SORTED_DIGITS)
        yield Problem(f"sort {''.join(digits)}", "".join(sorted(digits)))


def read_problems(paths: Sequence[str]) -> tuple[list[Problem], list[Problem]]:
    """The user's problems, JSON lines with a question and an answer: (to train on, held out by their text)."""
    train: list[Problem] = []
    held_out: dict[str, Problem] = {}
    for path in paths:
        for where, record in json_lines(path):
            wrong = [
                n
                for n in ("question", "answer")
                if not isinstance(record.get(n), str) or not record[n].strip()
            ]
            if wrong:
                raise UserError(f"{where}: needs the strings question and answer; missing {', '.join(wrong)}")
            problem = Problem(record["question"].strip(), record["answer"].strip())
            if is_held_out(problem.question):
                held_out[problem.question] = problem
            else:
                train.append(problem)
    if not train or not held_out:
        raise UserError(
            f"grpo.problems: one in {HELD_OUT_EVERY} is held out by its text, and there must be problems on both sides; got "
            f"{len(train)} to train on and {len(held_out)} held out"
        )
    return train, list(held_out.values())


def _solved(problems: Iterator[Problem]) -> Iterator[Messages]:
    for number, problem in enumerate(_side(problems, False), 1):
        yield chat(problem.question, problem.answer, "" if number % SYSTEM_EVERY else REFLECTION)


def _worked(seed: int) -> Iterator[Messages]:
    import reasoning_gym

    names = [("gsm_symbolic", 1200), ("basic_arithmetic", 400), ("chain_sum", 400)]
    sets = {
        name: reasoning_gym.create_dataset(name, size=size, seed=seed, **builtin.MATHS_SETTINGS.get(name, {}))
        for name, size in names
    }
    order = [(name, index) for name, size in names for index in range(size)]
    random.Random(seed).shuffle(order)
    for name, index in order:
        item = sets[name][index]
        question, worked = item["question"].strip(), item["metadata"].get("answer_cot") or item["answer"]
        expression = item["metadata"].get("expression", question)
        if not is_held_out(f"{expression} ="):  # or it could be a held-out problem of `sums` in other words
            yield chat(question, str(worked).strip())


def _translation(seed: int) -> Iterator[Messages]:
    pairs = []
    for document in builtin.multilingual():
        head, *blocks = document.split("\n\n")
        language = head.removeprefix("English to ")
        for block in blocks:
            lines = block.split("\n")
            if len(lines) == 2 and all(lines):  # one line of English, one of the translation
                pairs.append((language, *lines))
    random.Random(seed).shuffle(pairs)
    for language, source, target in pairs:
        yield chat(f"Translate into {language}: {source}", target)


_SPEECH = re.compile(r"^\*\*[^*\n]+\*\* *\n", re.MULTILINE)


def _dialogue(seed: int) -> Iterator[Messages]:
    pairs = []
    for scene in builtin.shakespeare():
        speeches = [" ".join(re.sub(r"_.*?_", "", s).split()) for s in _SPEECH.split(scene)[1:]]
        pairs += [p for p in itertools.pairwise(speeches) if all(0 < len(s) <= SPEECH_CHARS for s in p)]
    random.Random(seed).shuffle(pairs)
    for question, answer in pairs:
        yield chat(question, answer, system="Answer as in a play.")


SOURCES: dict[str, tuple[Callable[[int], Iterator[Messages]], Callable[[], str | None]]] = {
    "sums": (lambda seed: _solved(_every_sum(seed)), builtin.check_maths),
    "sorting": (lambda seed: _solved(_every_sorting(seed)), lambda: None),
    "worked": (_worked, builtin.check_maths),
    "translation": (_translation, builtin.check_multilingual),
    "dialogue": (_dialogue, builtin.check_shakespeare),
}


def load_chats(
    names: Sequence[str], counts: Sequence[int], user: Sequence[str] = (), *, seed: int = 0
) -> dict[str, list[Messages]]:
    """Conversations by source: at most `counts[i]` of `names[i]`, and all of each user's file.

    A source whose package is missing is an error that says how to get it: what is learnt must not depend in silence on
    what happens to be installed.
    """
    if len(names) != len(counts):
        raise UserError(f"sft.counts: must be one for each of {len(names)} sources; got {len(counts)}")
    chats: dict[str, list[Messages]] = {}
    for name, count in zip(names, counts, strict=True):
        if name not in SOURCES:
            raise UserError(f"sft.sources: must be among {', '.join(SOURCES)}; got {name!r}")
        load, check = SOURCES[name]
        if problem := check():
            raise UserError(f"sft.sources: {name} cannot be read: {problem}")
        chats[name] = [messages for messages, _ in zip(load(seed), range(count), strict=False)]
    for path in user:
        chats[f"user:{path}"] = list(read_chats(path))
    if not any(chats.values()):
        raise UserError("sft.sources, sft.user: hold no conversation; give at least one source or file")
    return chats
