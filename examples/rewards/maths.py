"""Whether two answers to a maths question are the same, decided exactly and without running anything of the text.

    same_answer("\\frac{1}{2}", "0.5")        True
    same_answer("x = 2\\sqrt{2}", "\\sqrt 8")  True
    same_answer("(1, 2]", "(1,2)")           False
    same_answer("12 apples", "12")           True

Both are read by `examples.rewards.expression`. Letters are variables: both answers are evaluated at the same few rational
points, so that x + 1 equals 1 + x. What does not parse is compared as text, without case, spaces and dressing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from examples.rewards.expression import LONGEST, NotMaths, Number, Value, equal, parse

# Variables take these values in turn, one set after the other: primes over small numbers, so that no two different
# expressions of a school book meet by accident.
_PRIMES = (7919, 10007, 20011, 30011, 40009, 50021, 60013, 70001, 80021, 90001)
_POINTS = 2


def same_answer(answer: str, reference: str) -> bool:
    """Whether `answer` says the same as `reference`. Units are left out where the reference is a number; letters in a
    reference are variables."""
    if _as_text(answer) == _as_text(reference):
        return bool(_as_text(reference))
    if max(len(answer), len(reference)) > LONGEST:
        return False
    answer, reference = _undress(answer), _undress(reference)
    if _as_text(answer) == _as_text(reference):
        return bool(_as_text(reference))
    letters = sorted(_variables(reference) | _variables(answer))
    if len(letters) > len(_PRIMES):
        return False
    points = [_point(letters, turn) for turn in range(_POINTS if letters else 1)]
    for expected_text in dict.fromkeys((reference, _without_units(reference))):
        expected = _values(expected_text, points)
        if expected is None:
            continue
        # "5 m" is five metres to a reference of 5, and five times m to one of 5m.
        bare = answer if _variables(expected_text) else _without_units(answer)
        for text in dict.fromkeys((answer, bare)):
            values = _values(text, points)
            if values is not None and all(map(equal, values, expected)):
                return True
        break
    return False


def _values(text: str, points: Sequence[Mapping[str, Number]]) -> list[Value] | None:
    """Values of an expression at the points, None if it is not one."""
    try:
        return [parse(text, point) for point in points]
    except NotMaths:
        return None


def math_verify_same(answer: str, reference: str) -> bool:
    """The same question, answered by the package math-verify (an optional extra, with a wider grammar; main thread only)."""
    package = importlib.import_module("math_verify")
    wrapped = [package.parse(f"\\boxed{{{text}}}") for text in (reference, answer)]
    return bool(package.verify(*wrapped))


# --- text --------------------------------------------------------------------------------------------------------

_SPACING = re.compile(
    r"\\[,;:!> ]|\\(?:quad|qquad|displaystyle|left|right|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])|~|\\?\$"
)
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⋅": "*", "π": "\\pi ", "√": "sqrt ", "²": "^2", "³": "^3",
     "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "°": "", "∞": "\\infty ", "\u00a0": " ", "€": "", "£": ""}
)  # fmt: skip
_ASSIGNED = re.compile(
    r"^\s*(?:\\?[a-zA-Z]{1,6}|[a-zA-Z]\([a-z]\)|[a-zA-Z]_\{?\w\}?)\s*(?:=|\\in(?![a-zA-Z]))\s*(?=\S)"
)
_UNIT = re.compile(
    r"(?:\s*\\(?:text|mbox|mathrm|textbf|operatorname)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?"  # \text{ cm}^2
    r"|\s*\\?%|\s*\^\s*\{?\s*\\circ\s*\}?"
    r"|\s*(?:/\s*)?(?<![\\a-zA-Z])[a-zA-Z]+\.?(?:\^\{?-?\d\}?)?)+\s*$"  # kilometres per hour, m/s, cm^2
)


def _undress(text: str) -> str:
    """Without spacing commands, currency, final stops, and the name of the thing (`x = `)."""
    text = text.strip().translate(_UNICODE)
    text = _SPACING.sub(" ", text).strip().rstrip(".。").strip()
    text = re.sub(r"^\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}$", r"\1", text)
    text = _ASSIGNED.sub("", text)
    if re.fullmatch(r"\{[^{},]*\}", text):
        text = text[1:-1]
    return text.strip()


def _as_text(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", " ", text.replace("\\", "")).strip().casefold()


def _without_units(text: str) -> str:
    """`text` without words, unit commands and percent signs after a number."""
    match = _UNIT.search(text)
    head = text[: match.start()] if match else text
    return head.strip() if re.search(r"[\d})]\s*$", head) else text


def _variables(text: str) -> set[str]:
    """Single letters that stand for themselves: all but e, and those of units behind a number."""
    return {word for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", text) if len(word) == 1} - {"e"}


def _point(letters: list[str], turn: int) -> dict[str, Number]:
    count = len(_PRIMES)
    return {
        letter: Fraction(_PRIMES[(3 * turn + i) % count], _PRIMES[(3 * turn + i + 1) % count] // 1000)
        for i, letter in enumerate(letters)
    }
