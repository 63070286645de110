"""Preference pairs whose better response is known, for training a judge and for measuring it (report section 5.2.1).

    sums      the right answer to a one-digit sum, and a near number: to tell them apart is to work it out and to compare
    size      the right answer, and a number that no such sum can have
    policy    a right and a wrong answer that the policy itself sampled, told apart by the rule: what the judge will meet
    brevity   twice the right answer, once as it is and once talked around

The report's preference data are not published; these need no download, and their rationales say something that can be checked:
the answer first, in the form in which fine-tuning taught it, then what follows from it. Held-out pairs are made of problems that
no stage trains on (`examples.data.chat_sources.is_held_out`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from examples.data.chat_sources import Problem
from examples.errors import UserError
from examples.rewards.model import Preference, read_preferences
from examples.rewards.rules import Rule

NEAR = (-10, -3, -2, -1, 1, 2, 3, 10)  # a near number differs from the right one by one of these
FAR = range(30, 100)  # sums of three digits are from -18 to 27
TALK = (
    "I think the answer is {}.",
    "Let me see. It may well be {}.",
    "Well, if I am not wrong, {} it is.",
    "That is not hard: {}, as anybody can see.",
)
SOURCES = ("sums", "size", "policy", "brevity")


def sums_pairs(problems: Sequence[Problem], rng: random.Random) -> list[Preference]:
    """One pair of each problem: its answer, and a number near to it."""
    return [_right(p, p.answer, str(int(p.answer) + rng.choice(NEAR))) for p in problems]


def size_pairs(problems: Sequence[Problem], rng: random.Random) -> list[Preference]:
    """One pair of each problem: its answer, and a number far from it."""
    return [_right(p, p.answer, str(rng.choice((-1, 1)) * rng.choice(FAR))) for p in problems]


def policy_pairs(
    problems: Sequence[Problem], answers: Sequence[Sequence[str]], verify: Rule
) -> list[Preference]:
    """One pair of each problem to which the policy gave right and wrong answers: the first of either."""
    pairs = []
    for problem, group in zip(problems, answers, strict=True):
        right = [verify(problem.question, text, problem.answer) >= 1 for text in group]
        if any(right) and not all(right):
            pairs.append(_right(problem, group[right.index(True)], group[right.index(False)]))
    return pairs


def brevity_pairs(problems: Sequence[Problem], rng: random.Random) -> list[Preference]:
    """One pair of each problem: its answer, and the same in many words."""
    pairs = []
    for problem in problems:
        answer = problem.answer
        rationale = f"{answer} is what both say, and {{chosen}} is shorter."
        pairs.append(Preference(problem.question, answer, rng.choice(TALK).format(answer), rationale))
    return pairs


GENERATED = {"sums": sums_pairs, "size": size_pairs, "brevity": brevity_pairs}  # those that need no policy


def _right(problem: Problem, chosen: str, rejected: str) -> Preference:
    # It does not name a response: then the verdict, a probability, is where the comparison is made, and not a word before it.
    return Preference(problem.question, chosen, rejected, f"{problem.answer} is right.")


def user_pairs(
    paths: Sequence[str], every: int
) -> tuple[dict[str, list[Preference]], dict[str, list[Preference]]]:
    """(to train on, held out) of users' JSONL by file. One prompt in `every` is held out, by its hash: pairs of one prompt stay
    together."""
    train: dict[str, list[Preference]] = {}
    held_out: dict[str, list[Preference]] = {}
    for path in paths:
        pairs = read_preferences(Path(path))
        digests = [_digest(pair.prompt) for pair in pairs]
        smallest = sorted(set(digests))[:2]
        if len(smallest) < 2:
            raise UserError(f"reward.user: {path} must have at least 2 different prompts; got 1")
        for pair, digest in zip(pairs, digests, strict=True):  # neither side stays empty
            out = digest == smallest[0] or (digest != smallest[1] and digest % every == 0)
            (held_out if out else train).setdefault(f"user:{path}", []).append(pair)
    return train, held_out


def _digest(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")
