"""What a rule can decide about a response (report section 5.2.1, "Rule-Based RM"), as plain callables.

    rule(prompt, response, reference) -> float in [0, 1]

    number, exact   the answer, in a box or after the last =, is the reference: the same integer, or the same characters
    maths           the last \\boxed{} says the same as the reference, exactly
    code            the last code block passes the reference's tests in the sandbox
    tags, reflection, length, language     form: what reinforcement learning may reward besides being right

A rule never raises because of a response: what cannot be read is wrong. `Weighted` adds rules up and keeps the parts for
the metrics.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from examples.errors import UserError
from examples.rewards.maths import same_answer
from examples.rewards.sandbox import Result, Sandbox

Rule = Callable[[str, str, str], float]


@dataclass(frozen=True)
class Weighted:
    """A sum of named rules: `Weighted({"maths": (maths, 1.0), "form": (tags("think", "answer"), 0.1)})`.

    gate: name of a rule without which the others count for nothing, so that form alone is never worth learning.
    """

    rules: Mapping[str, tuple[Rule, float]]
    gate: str | None = None

    def __post_init__(self) -> None:
        if not self.rules or (self.gate is not None and self.gate not in self.rules):
            raise UserError(
                f"rewards: gate must name one of the rules {', '.join(self.rules)}; got {self.gate!r}"
            )

    def parts(self, prompt: str, response: str, reference: str) -> dict[str, float]:
        """Value of each rule, unweighted."""
        return {name: rule(prompt, response, reference) for name, (rule, _) in self.rules.items()}

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        return self.many([(prompt, response, reference)])[0]

    def many(self, asked: Sequence[tuple[str, str, str]]) -> list[float]:
        """Of many at once; what the gate stops is not shown to the other rules."""
        total = [0.0] * len(asked)
        left = list(range(len(asked)))
        order = sorted(self.rules, key=lambda name: name != self.gate)  # the gate first
        for name in order:
            rule, weight = self.rules[name]
            values = values_of(rule, [asked[i] for i in left])
            for i, value in zip(left, values, strict=True):
                total[i] += weight * value
            if name == self.gate:
                kept = [i for i, value in zip(left, values, strict=True) if value > 0]
                for i in set(left) - set(kept):
                    total[i] = 0.0
                left = kept
        return total


def values_of(rule: Rule, asked: Sequence[tuple[str, str, str]]) -> list[float]:
    """A rule's value of each (prompt, response, reference): all at once where it can (`many`), as a judge does."""
    many = getattr(rule, "many", None)
    return many(asked) if many else [rule(*triple) for triple in asked]


# --- maths -------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\boxed\s*\{")


def boxed_answer(text: str) -> str | None:
    """What is in the last \\boxed{...}, braces inside it included; None without one, or if it never closes."""
    box = None
    for box in _BOX.finditer(text):  # noqa: B007 (the last one)
        pass
    if box is None:
        return None
    depth, at = 1, box.end()
    while at < len(text):
        if text[at] == "\\":  # \{ and \} are not braces
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[box.end() : at].strip()
        at += 1
    return None


def maths(prompt: str, response: str, reference: str) -> float:
    """1 if the last boxed answer equals the reference (which may be boxed itself)."""
    answer = boxed_answer(response)
    if answer is None:
        return 0.0
    return float(same_answer(answer, boxed_answer(reference) or reference))


def boxed(prompt: str, response: str, reference: str) -> float:
    """1 if there is an answer in a box."""
    return float(bool(boxed_answer(response)))


_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


def number(prompt: str, response: str, reference: str) -> float:
    """1 if the answer is the integer `reference`, written out: the last box, else what stands after the last `=`, else all.

    For questions that are expressions themselves: `maths` evaluates an answer, and so would find the question repeated right.
    """
    answer = _written(response)
    return float(bool(_INTEGER.fullmatch(answer)) and int(answer) == int(reference))


def exact(prompt: str, response: str, reference: str) -> float:
    """1 if the answer is the reference, character by character; it stands where `number` finds it."""
    return float(_written(response) == reference)


def _written(response: str) -> str:
    """What the response gives as its answer: the last box, else what stands after the last `=`, else all of it."""
    answer = boxed_answer(response)
    return response.rsplit("=", 1)[-1].strip() if answer is None else answer


# --- code --------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def code_block(text: str) -> str | None:
    """The last complete ``` block that is Python or says nothing of its language; None without one."""
    blocks = [
        body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")
    ]
    return blocks[-1] if blocks else None


def run_tests(sandbox: Sandbox, code: str, tests: str) -> tuple[bool, Result]:
    """Whether `tests` (statements that raise where `code` is wrong) ran to their end after `code`.

    To end early with exit code 0 is not to pass: the last line that is printed must be a word made for this run. `code` is a
    module, so its `if __name__ == "__main__":` does not run. Both share a process, as in every public harness: a program
    that goes looking for the tests it runs under can find them.
    """
    word = secrets.token_hex(16)
    program = (
        "import sys, types\n"
        "module = sys.modules['solution'] = types.ModuleType('solution')\n"
        f"exec(compile({code!r}, 'solution.py', 'exec'), module.__dict__)\n"
        f"exec(compile({tests!r}, 'tests.py', 'exec'), module.__dict__)\n"
        f"sys.__stdout__.write('\\n{word}\\n')\n"
    )
    result = sandbox.run(program)
    return result.ok and result.stdout.endswith(f"\n{word}\n"), result


@dataclass(frozen=True)
class Code:
    """1 if the last code block of the response passes the tests in `reference`."""

    sandbox: Sandbox = field(default_factory=Sandbox)

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        block = code_block(response)
        return float(block is not None and run_tests(self.sandbox, block, reference)[0])


# --- form --------------------------------------------------------------------------------------------------------


def tags(*names: str) -> Rule:
    """1 if the response is exactly <a>...</a> <b>...</b> for the given names: each once, in order, none of them empty."""
    pattern = re.compile(
        r"\s*" + r"\s*".join(rf"<{name}>(?P<{name}>.*?)</{name}>" for name in names) + r"\s*", re.DOTALL
    )

    def rule(prompt: str, response: str, reference: str) -> float:
        match = pattern.fullmatch(response)
        if match is None or not all(match[name].strip() for name in names):
            return 0.0
        return float(all(response.count(f"<{name}>") == response.count(f"</{name}>") == 1 for name in names))

    return rule


# What reasoning says when it looks at itself again: doubt, checking, another way.
_REFLECTION = re.compile(
    r"\b(?:wait|hold on|let me (?:re-?)?(?:check|verify|think|consider)|(?:double|re)-?check(?:ing)?|to verify|"
    r"verif(?:y|ying|ication)|on second thought|mistake|alternatively|another way|check(?=:))\b",
    re.IGNORECASE,
)


def reflections(text: str) -> int:
    """How often the text doubts or checks itself."""
    return len(_REFLECTION.findall(text))


def reflection(prompt: str, response: str, reference: str) -> float:
    """1 if the response checks itself at least once."""
    return float(reflections(response) > 0)


def length(longest: int, *, shortest: int = 0, margin: int | None = None) -> Rule:
    """1 while the response has `shortest` to `longest` words, falling to 0 over `margin` more (default: as many again)."""
    margin = longest if margin is None else margin
    if not 0 <= shortest <= longest or margin < 0:
        raise UserError(
            f"length: must have 0 <= shortest <= longest, margin >= 0; got {shortest}, {longest}, {margin}"
        )

    def rule(prompt: str, response: str, reference: str) -> float:
        words = len(response.split())
        if words < shortest:
            return words / shortest
        return max(0.0, 1 - max(0, words - longest) / margin) if margin else float(words <= longest)

    return rule


# --- language ----------------------------------------------------------------------------------------------------

_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+|</?\w+>|https?://\S+", re.DOTALL
)
_KANA = ("HIRAGANA", "KATAKANA")


def scripts(text: str) -> Counter[str]:
    """Letters per script (LATIN, CYRILLIC, CJK, ...) outside code, formulas, tags and addresses."""
    names = (unicodedata.name(c, "") for c in _NOT_LANGUAGE.sub(" ", text) if c.isalpha())
    return Counter(name.split(" ", 1)[0].removeprefix("FULLWIDTH").strip("-") for name in names if name)


def language(prompt: str, response: str, reference: str) -> float:
    """Share of the response's letters that are of the prompt's script; Japanese is three of them. 1 if either has none."""
    asked, given = scripts(prompt), scripts(response)
    if not asked or not given:
        return 1.0
    main = asked.most_common(1)[0][0]
    japanese = main in _KANA or (main == "CJK" and any(asked[kana] for kana in _KANA))
    wanted = (*_KANA, "CJK") if japanese else (main,)
    return sum(given[script] for script in wanted) / given.total()
