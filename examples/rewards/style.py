"""Length and style control of distillation (report section 5.1).

Responses of a reasoning model are right more often than those of its student, but long, repetitive, and careless about form.
From several right ones the student should learn the clear and concise one, which `examples.stages.distill.select` keeps.
Faults are named, so that a run can say why it rejected what it rejected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.errors import UserError
from examples.rewards.rules import boxed_answer, language, reflections

_NGRAM = 6  # words; shorter repetitions are grammar


@dataclass(frozen=True)
class StyleLimits:
    """What a response may be.

    shortest, longest: words; a bare answer teaches no reasoning. reflections: how often it may doubt itself. repetition:
    share of its 6-word runs that occur before. language: least share of letters in the prompt's script. boxed: must have a
    \\boxed answer, and may go on for `after` words behind it.
    """

    shortest: int = 1
    longest: int = 2000
    reflections: int = 6
    repetition: float = 0.2
    language: float = 0.9
    boxed: bool = True
    after: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest:
            raise UserError(f"style: must have 0 <= shortest <= longest; got {self.shortest}, {self.longest}")


def repetition(text: str) -> float:
    """Share of the runs of 6 words that have occurred before in the text."""
    words = text.split()
    runs = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def faults(prompt: str, response: str, limits: StyleLimits) -> list[str]:
    """Names of everything that is wrong with the form of a response."""
    words = len(response.split())
    boxed = boxed_answer(response)
    after = len(response[response.rfind("\\boxed") :].split()) - len((boxed or "").split())
    prose = re.sub(r"^```.*?^```[ \t]*$", "", response, flags=re.MULTILINE | re.DOTALL)
    found = {
        "too short": words < limits.shortest,
        "too long": words > limits.longest,
        "overthinking": reflections(response) > limits.reflections,
        "repetitive": repetition(response) > limits.repetition,
        "mixed languages": language(prompt, response, "") < limits.language,
        "no boxed answer": limits.boxed and not boxed,
        "goes on after the answer": limits.boxed and bool(boxed) and after > limits.after,
        "open code block": len(re.findall(r"^```", response, re.MULTILINE)) % 2 == 1,
        "open formula": len(re.findall(r"(?<!\\)\$", prose)) % 2 == 1,
        "open bracket": prose.count("\\[") != prose.count("\\]") or prose.count("\\(") != prose.count("\\)"),
        "open tag": any(
            response.count(f"<{name}>") != response.count(f"</{name}>")
            for name in set(re.findall(r"</?([a-z]{2,16})>", prose))
        ),
    }
    return [name for name, is_so in found.items() if is_so]
