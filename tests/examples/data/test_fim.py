"""Fill-in-the-middle: the parts are the document, the order is the report's, the rate is kept."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from examples.data.fim import apply_fim, fim_order


@given(st.text(max_size=50), st.integers(0, 1000))
def test_parts_are_the_document(text, seed):
    parts = apply_fim(text, np.random.default_rng(seed), 1.0)
    assert parts is not None
    assert parts.prefix + parts.middle + parts.suffix == text


def test_rate():
    rng = np.random.default_rng(0)
    hits = sum(apply_fim("text", rng, 0.1) is not None for _ in range(5000))
    assert 430 < hits < 570
    assert all(apply_fim("text", rng, 0.0) is None for _ in range(100))


def test_cuts_are_uniform_over_all_places():
    rng = np.random.default_rng(0)
    n, runs = 9, 20_000
    prefix, middle = np.zeros(n + 1), np.zeros(n + 1)
    for _ in range(runs):
        parts = apply_fim("x" * n, rng, 1.0)
        assert parts is not None
        prefix[len(parts.prefix)] += 1
        middle[len(parts.middle)] += 1
    # The smaller of two uniform numbers in 0..n, and their distance.
    k = np.arange(n + 1)
    expected_prefix = (2 * (n - k) + 1) / (n + 1) ** 2
    expected_middle = np.where(k == 0, n + 1, 2 * (n + 1 - k)) / (n + 1) ** 2
    assert np.abs(prefix / runs - expected_prefix).max() < 0.01
    assert np.abs(middle / runs - expected_middle).max() < 0.01


def test_order_is_prefix_suffix_middle():
    ids = SimpleNamespace(fim_begin_id=100, fim_hole_id=101, fim_end_id=102, eos_id=103)
    assert fim_order(ids, [1, 2], [5], [3, 4]) == [100, 1, 2, 101, 3, 4, 102, 5, 103]
    assert fim_order(ids, [], [], []) == [100, 101, 102, 103]
