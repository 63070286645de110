"""Answers that are the same, answers that are not, and texts made to hurt the reader."""

import contextlib
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.rewards import maths
from examples.rewards.expression import LONGEST, NotMaths, parse
from examples.rewards.maths import math_verify_same, same_answer

SAME = [
    # numbers
    ("7.", "7"), ("−5", "-5"), ("1,234", "1234"), ("1{,}234.50", "1234.5"), ("1e3", "1000"), (".75", "3/4"), ("{7}", "7"),
    ("1/3", "2/6"), ("\\frac12", "0.5"), ("\\dfrac{3}{4}", ".75"), ("½", "0.5"), ("1 1/2", "3/2"), ("-1\\frac12", "-1.5"),
    # dressing and units
    ("$5$", "5"), ("\\$5.00", "5"), ("50\\%", "50"), ("50 %", "50"), ("30^\\circ", "30"), ("30°", "30"), ("12 apples", "12"),
    ("5\\text{ cm}^2", "5"), ("10 km/h", "10"), ("5 m", "5"), ("5", "5 cm"), ("x = 5", "5"), ("f(x) = 2x", "2x"),
    ("x \\in [1, 2]", "[1,2]"), ("\\left( 2 \\right)", "2"),
    # expressions
    ("3(4)", "12"), ("1 - 2 - 3", "-4"), ("8/4/2", "1"), ("-2^2", "-4"), ("(-2)^2", "4"), ("2^{-1}", "0.5"), ("2**3", "8"),
    ("4^{1/2}", "2"), ("\\sqrt[3]{27}", "3"), ("√16", "4"), ("2\\sqrt{2}", "\\sqrt 8"), ("2π", "\\pi \\cdot 2"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("2\\frac{\\pi}{3}", "\\frac{2\\pi}{3}"),
    ("(1+\\sqrt5)^2", "6+2\\sqrt5"),
    # variables
    ("1+x", "x+1"), ("(x+1)^2", "x^2+2x+1"), ("\\frac{x}{y}", "x/y"), ("\\frac{x^2-1}{x-1}", "x+1"),
    # lists and words
    ("(1,2)", "( 1 , \\frac{4}{2} )"), ("\\{2, 1\\}", "\\{1,2\\}"), ("[0,\\infty)", "[0, \\infty)"), ("1, 2", "1,2"),
    ("\\text{Tuesday}", "tuesday"), ("YES.", "yes"), ("x > 3 or x < 1", "x>3 or x<1".replace(">", " > ").replace("<", " < ")),
]  # fmt: skip
DIFFERENT = [
    ("5", "6"), ("0.33", "1/3"), ("3.14159", "\\pi"), ("0.1+0.2", "0.30000000000000004"), ("1,2", "12"), ("2 3", "23"),
    ("2 3", "6"), ("(1,234)", "1234"), ("(1,2)", "(2,1)"), ("(1,2]", "(1,2)"), ("[1,2]", "\\{1,2\\}"),
    ("\\{1,1\\}", "\\{1,2\\}"), ("\\{1,2\\}", "\\{1,1\\}"), ("(1,2,3)", "(1,2)"), ("x", "y"), ("x^2", "x^3"),
    ("7919/10", "x"), ("5", "5m"), ("12 apples and 3", "12"), ("7 or 8", "7"), ("-5", "5"), ("1/2", "2/1"),
    ("", "5"), ("5", ""), ("", ""), ("\\ ", "\\ "), ("yes", "no"),
    # not defined, or not real
    ("1/0", "1"), ("0^0", "1"), ("x/0", "x"), ("\\sqrt{-1}", "1"), ("\\infty-\\infty", "0"), ("\\frac{1}{1-1}", "1"),
]  # fmt: skip
HOSTILE = [
    "9^9^9^9", "9^99999", "9^{-99999}", "(9^999)^999", "\\sqrt[999]{2}", "2^{\\pi}", "1e999999999", "9" * 10**6, "a" * 10**6,
    "(" * 10**5, "(" * 199 + ")" * 199, "{" * 200, "\\frac" * 60, "-" * 300 + "1", "1 " * 190, "x y " * 100, "a b c d e f g h i j k l m",
    "\\text{" * 50, "aaaaaaaa " * 40 + "!", "1" + "/m" * 180 + "!", "__import__('os').system('echo')", "\\", "^", "\x00", "𝟙", "٣",
    "1" + "\\%" * 150 + "=", "," * 300, "1," * 150, "\\sqrt" * 70 + "2", "=" * 300, "^2" * 150,
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same(answer, reference):
    assert same_answer(answer, reference)
    assert same_answer(reference, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different(answer, reference):
    assert not same_answer(answer, reference)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_quick_and_quiet(text):
    start = time.process_time()
    for reference in ("1", "x+1", "(1,2)", "\\sqrt 2"):
        assert not same_answer(text, reference)
        same_answer(reference, text)
    same_answer(text, text)
    assert time.process_time() - start < 1.0


INTEGERS = st.integers(-(10**6), 10**6)


@given(INTEGERS, INTEGERS, INTEGERS.filter(bool), INTEGERS)
def test_arithmetic_is_that_of_fractions(a, b, c, d):
    text = f"({a}) \\cdot {abs(b)} - \\frac{{{d}}}{{{c}}} + ({c})^2/{abs(c)}"
    exact = Fraction(a) * abs(b) - Fraction(d, c) + Fraction(c * c, abs(c))
    assert parse(text) == exact
    assert same_answer(text, f"{exact.numerator}/{exact.denominator}")
    assert not same_answer(text, f"{exact.numerator + 1}/{exact.denominator}")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_exact(value):
    assert parse(f"{value:f}") == Fraction(value)
    assert parse(f"{value:,f}") == Fraction(value)


@given(st.text(alphabet="0123456789+-*/^(){}[],.\\ xyfracsqtpie=", max_size=60))
def test_any_text_gives_a_value_or_not_maths(text):
    with contextlib.suppress(NotMaths):
        assert isinstance(parse(text), Fraction | Decimal | tuple)
    assert isinstance(same_answer(text, "x+1"), bool)


def test_a_root_that_is_almost_rational_is_not():
    assert not same_answer("\\sqrt{1.0000000000000000000000000000001}", "1")
    assert same_answer("\\sqrt{2}\\sqrt{3}", "\\sqrt{6}")
    assert parse("\\sqrt{\\frac{4}{9}}") == Fraction(2, 3)


def test_length_limit():
    assert parse("1" * LONGEST) == int("1" * LONGEST)
    with pytest.raises(NotMaths, match="more than"):
        parse("1" * (LONGEST + 1))


def test_two_points_are_needed():
    """What agrees at the first point by design does not at the second."""
    first = maths._point(["x"], 0)["x"]
    assert not same_answer(f"{first.numerator}/{first.denominator}", "x")


def test_math_verify_agrees():
    pytest.importorskip("math_verify", reason="the optional package math-verify is not installed")
    for answer, reference in (("\\frac{1}{2}", "0.5"), ("2\\sqrt{2}", "\\sqrt{8}"), ("(1,2)", "(1,2)")):
        assert math_verify_same(answer, reference)
    assert not math_verify_same("3", "4")
