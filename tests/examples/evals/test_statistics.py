"""Intervals against their definition, pass@k against counting, labels."""

import itertools
import math

import pytest

from examples.errors import UserError
from examples.evals.statistics import pass_at_k, score, wilson


@pytest.mark.parametrize(
    ("right", "count"), [(0, 1), (0, 50), (1, 1), (3, 10), (25, 100), (50, 50), (499, 1000)]
)
def test_wilson_bounds_solve_their_equation(right, count):
    """At each bound p the observed share is 1.96 standard errors of p away."""
    share = right / count
    for bound in wilson(right, count):
        assert 0 <= bound <= 1
        assert abs(share - bound) == pytest.approx(
            1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-6
        )


@pytest.mark.parametrize("count", range(1, 60))
def test_the_share_lies_in_its_interval(count):
    """Exactly, at both ends too, whatever rounding does."""
    for right in (0, count // 3, count):
        low, high = wilson(right, count)
        assert low <= right / count <= high


def test_wilson_covers():
    """Of all outcomes of 20 throws, those whose interval holds the truth have about 95 % of the probability."""
    for p in (0.25, 0.5, 0.9):
        covered = sum(
            math.comb(20, k) * p**k * (1 - p) ** (20 - k)
            for k in range(21)
            if wilson(k, 20)[0] <= p <= wilson(k, 20)[1]
        )
        assert 0.92 < covered < 0.99


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k(samples, passed):
    outcomes = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        choices = [any(chosen) for chosen in itertools.combinations(outcomes, k)]
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(choices) / len(choices))


def test_near_chance():
    assert score("x", [True] * 28 + [False] * 72, 0.25).near_chance
    assert not score("x", [True] * 40 + [False] * 60, 0.25).near_chance
    assert score("x", [False] * 100, 0.25).near_chance  # below chance is no achievement
    assert not score("x", [False] * 5, 0.0).near_chance  # nobody guesses a number
    text = str(score("MCQ", [True] * 28 + [False] * 72, 0.25))
    assert text == "MCQ: 28.0% [20.1%, 37.5%] of 100, chance 25.0% (near chance)"
    assert score("x", [True, False]).to_dict()["near_chance"] is False


@pytest.mark.parametrize(
    "call",
    [lambda: wilson(0, 0), lambda: wilson(3, 2), lambda: pass_at_k(3, 4, 1), lambda: pass_at_k(3, 1, 4)],
)
def test_errors(call):
    with pytest.raises(UserError, match="must have"):
        call()
