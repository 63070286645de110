"""Expressions of school mathematics, in LaTeX or plain notation, evaluated exactly.

A recursive-descent parser turns text into a number: a `Fraction` while everything is rational, else a decimal of 60
digits, of which 45 must agree for two to be equal. Nothing of the text is ever run, and its length, depth, exponents and
digits are bounded, for it is a model's: what takes long, or is not in the grammar, raises `NotMaths`.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

LONGEST = 400  # characters of an expression
_DEPTH = 40
_BITS = 4096  # of a numerator or denominator
_EXPONENT = 1024
_CONTEXT = decimal.Context(
    prec=60, traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow]
)
_AGREE = Decimal(10) ** -45
_CONSTANTS = {
    "\\pi": Decimal("3.14159265358979323846264338327950288419716939937510582097494459"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369995957496696763"),
    "\\infty": Decimal("Infinity"),
}

Number = Fraction | Decimal
Value = Number | tuple[str, list]  # a list comes with its brackets: "(]", "{}", ...


class NotMaths(ValueError):
    """The text is not an expression of the grammar, or breaks one of its bounds."""


# --- parser ------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"\d+\.?\d*(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+", re.ASCII)
_GROUPED = re.compile(r"\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?(?![\d,])", re.ASCII)  # 1,234.5
_SYMBOL = re.compile(r"\\[{}]|\\[a-zA-Z]+|[a-zA-Z]+|\*\*|[-+*/^()\[\]{},]")
_TIMES, _OVER, _FRACTIONS = ("*", "\\cdot", "\\times"), ("/", "\\div"), ("\\frac", "\\dfrac", "\\tfrac")
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}
_SYNONYMS = {"pi": "\\pi", "inf": "\\infty", "infinity": "\\infty", "**": "^"}


def parse(text: str, variables: Mapping[str, Number] | None = None) -> Value:
    """The value of an expression, or of a list of them; `NotMaths` if it is not one."""
    if len(text) > LONGEST:
        raise NotMaths(f"more than {LONGEST} characters")
    return _Parser(_tokens(text), {**_CONSTANTS, **(variables or {})}).whole()


def _tokens(text: str) -> list[str]:
    """Numbers begin with a digit or a point, everything else with something else."""
    tokens: list[str] = []
    depth, at, text = 0, 0, text.strip()
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        # Inside brackets a comma separates, outside it may group digits.
        match = (_GROUPED.match(text, at) if not depth else None) or _NUMBER.match(text, at)
        if match:
            tokens.append(match[0].replace("{,}", "").replace(",", ""))
        else:
            match = _SYMBOL.match(text, at)
            if match is None:
                raise NotMaths(f"unexpected {text[at : at + 8]!r}")
            tokens.append(_SYNONYMS.get(match[0], match[0]))
            depth += (match[0] in _CLOSING) - (match[0] in (")", "]", "}", "\\}"))
        at = match.end()
    return tokens


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or token[:1] == "."


class _Parser:
    """Recursive descent: list, sum, product, sign, power, atom."""

    def __init__(self, tokens: list[str], names: Mapping[str, Number]) -> None:
        self._tokens, self._names = tokens[::-1], names  # the next one is the last
        self._depth = 0

    def _peek(self, ahead: int = 0) -> str:
        return self._tokens[-1 - ahead] if ahead < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise NotMaths(f"unexpected {token or 'end'!r}")
        return self._tokens.pop()

    def whole(self) -> Value:
        """All tokens, as one value or as a list without brackets."""
        items = self._items()
        if self._tokens:
            raise NotMaths(f"unexpected {self._peek()!r}")
        return items[0] if len(items) == 1 else ("", items)

    def _items(self) -> list[Value]:
        items = [self._sum()]
        while self._peek() == ",":
            self._take()
            items.append(self._sum())
        return items

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > _DEPTH:
            raise NotMaths("nested too deeply")
        value = self._product()
        while self._peek() in ("+", "-"):
            add = self._take() == "+"
            other = _number(self._product())
            exact = Fraction.__add__ if add else Fraction.__sub__
            value = _apply("add" if add else "subtract", exact, _number(value), other)
        self._depth -= 1
        return value

    def _product(self) -> Value:
        value = self._signed()
        while True:
            token = self._peek()
            if token in _OVER:
                self._take()
                value = _divide(_number(value), _number(self._signed()))
            elif token in _TIMES or (self._starts_atom(token) and not _is_number(token)):
                if token in _TIMES:
                    self._take()
                factor = _number(self._signed() if token in _TIMES else self._powered())
                value = _apply("multiply", Fraction.__mul__, _number(value), factor)
            else:
                return value

    def _starts_atom(self, token: str) -> bool:
        return _is_number(token) or token in ("(", "{", "\\sqrt", "sqrt", *_FRACTIONS) or token in self._names

    def _signed(self) -> Value:
        negative, signs = False, 0
        while self._peek() in ("+", "-"):
            negative ^= self._take() == "-"
            signs += 1
            if signs > 2:
                raise NotMaths("a row of signs")
        value = self._powered()
        return _apply("subtract", Fraction.__sub__, Fraction(0), _number(value)) if negative else value

    def _powered(self) -> Value:
        value = self._atom()
        if self._peek() != "^":
            return value
        self._take()
        negative = self._peek() == "-"
        if negative:
            self._take()
        exponent = _number(self._atom())
        return _power(_number(value), -exponent if negative else exponent)

    def _atom(self) -> Value:
        token = self._take()
        if _is_number(token):
            return self._mixed(Fraction(token))
        if token in self._names:
            return self._names[token]
        if token in _FRACTIONS:
            return _divide(self._argument(), self._argument())
        if token in ("\\sqrt", "sqrt"):
            degree: Number = Fraction(2)
            if token == "\\sqrt" and self._peek() == "[":
                self._take()
                degree = _number(self._sum())
                self._take("]")
            if not isinstance(degree, Fraction) or degree.denominator != 1:
                raise NotMaths("a root of a degree that is not whole")
            return _root(self._argument() if token == "\\sqrt" else _number(self._atom()), int(degree))
        if token in _CLOSING:
            items = self._items()
            kind = token[-1] + self._take(*_CLOSING[token])[-1]
            grouping = len(items) == 1 and kind in ("()", "{}") and token != "\\{"
            return items[0] if grouping else (kind, items)
        raise NotMaths(f"unexpected {token!r}")

    def _mixed(self, whole: Fraction) -> Number:
        r"""1 1/2 and 1\frac{1}{2} are one and a half; but 2\frac{\pi}{3} is a product."""
        if whole.denominator == 1 and self._peek() in _FRACTIONS:
            part = _number(self._atom())
            if isinstance(part, Fraction) and 0 < part < 1:
                return _bounded(whole + part)
            return _apply("multiply", Fraction.__mul__, whole, part)
        if (
            whole.denominator == 1
            and self._peek(1) == "/"
            and self._peek().isdigit()
            and self._peek(2).isdigit()
        ):
            numerator, _, denominator = (self._take() for _ in range(3))
            return _bounded(whole + Fraction(_divide(Fraction(numerator), Fraction(denominator))))
        return whole

    def _argument(self) -> Number:
        """Of a LaTeX command: a group, a command, or the next character alone (\frac12)."""
        token = self._peek()
        if (_is_number(token) or token.isalpha()) and len(token) > 1:
            self._take()
            self._tokens += [token[1:], token[0]]
            if _is_number(token):
                return Fraction(self._take())
        return _number(self._atom())


def _number(value: Value) -> Number:
    if isinstance(value, tuple):
        raise NotMaths("arithmetic with a list")
    return value


# --- numbers -----------------------------------------------------------------------------------------------------


def _decimal(value: Number) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return _CONTEXT.divide(Decimal(value.numerator), Decimal(value.denominator))


def _bounded(value: Number) -> Number:
    if (
        isinstance(value, Fraction)
        and max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS
    ):
        raise NotMaths("a number with too many digits")
    return value


def _apply(name: str, exact: Callable[[Fraction, Fraction], Fraction], a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(exact(a, b))
    try:
        return getattr(_CONTEXT, name)(_decimal(a), _decimal(b))
    except decimal.DecimalException as error:
        raise NotMaths(name) from error


def _divide(a: Number, b: Number) -> Number:
    if b == 0:
        raise NotMaths("division by zero")
    return _apply("divide", lambda x, y: x / y, a, b)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Decimal) or abs(exponent) > _EXPONENT:
        raise NotMaths("an exponent that is not a small number")
    if exponent.denominator != 1:
        return _power(_root(base, exponent.denominator), Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise NotMaths("zero to a power that is not positive")
    if isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > _BITS:
            raise NotMaths("a number with too many digits")
        return base ** int(exponent)
    return _apply("power", pow, base, exponent)


def _root(value: Number, degree: int) -> Number:
    """The real root: exact where it is rational."""
    if not 2 <= degree <= 16 or (value < 0 and degree % 2 == 0):
        raise NotMaths("a root that is not real")
    if value < 0:
        return -_root(-value, degree)
    if isinstance(value, Fraction):
        numerator, denominator = (_integer_root(n, degree) for n in (value.numerator, value.denominator))
        if numerator**degree == value.numerator and denominator**degree == value.denominator:
            return Fraction(numerator, denominator)
    try:
        if degree == 2:
            return _CONTEXT.sqrt(_decimal(value))
        return _CONTEXT.power(_decimal(value), _CONTEXT.divide(Decimal(1), Decimal(degree)))
    except decimal.DecimalException as error:
        raise NotMaths("root") from error


def _integer_root(value: int, degree: int) -> int:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def equal(a: Value, b: Value) -> bool:
    """Whether two values are the same; lists item by item and bracket by bracket, sets in any order."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        if not (isinstance(a, tuple) and isinstance(b, tuple)) or a[0] != b[0] or len(a[1]) != len(b[1]):
            return False
        if a[0] == "{}":  # a set has no order
            left = list(b[1])
            for item in a[1]:
                found = next((i for i, other in enumerate(left) if equal(item, other)), None)
                if found is None:
                    return False
                del left[found]
            return True
        return all(map(equal, a[1], b[1]))
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _decimal(a), _decimal(b)
    if not (a.is_finite() and b.is_finite()):
        return a == b
    return abs(_CONTEXT.subtract(a, b)) <= _CONTEXT.multiply(_AGREE, max(abs(a), abs(b), Decimal(1)))
