"""The mixture: exact shares, a true permutation per epoch, and a state that is only a position."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.data.mixture import Mixture, Permutation
from examples.errors import UserError

LENGTHS = {"a": [5, 1, 9, 3], "b": [2, 2], "c": [40, 7, 1]}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def _mixture(seed: int = 0, weights: dict[str, float] | None = None) -> Mixture:
    sizes = {name: len(lengths) for name, lengths in LENGTHS.items()}
    return Mixture(sizes, lambda name, i: LENGTHS[name][i], weights or WEIGHTS, seed)


@given(st.integers(1, 300), st.text(max_size=5))
def test_permutation_is_a_bijection(n, key):
    order = Permutation(n, key)
    assert sorted(order[i] for i in range(n)) == list(range(n))
    assert len(order) == n


def test_permutation_mixes_and_depends_on_its_key():
    n = 10_000
    order = [Permutation(n, "k")[i] for i in range(n)]
    assert order != [Permutation(n, "l")[i] for i in range(n)]
    neighbours = sum(abs(a - b) for a, b in pairwise(order)) / n
    assert abs(neighbours / (n / 3) - 1) < 0.05, "distance of random neighbours is n / 3"
    assert sum(i == p for i, p in enumerate(order)) < 10
    big = 1 << 40
    assert 0 <= Permutation(big, "k")[big - 1] < big
    with pytest.raises(IndexError):
        Permutation(5, "k")[5]


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(0, 5))
def test_shares_are_kept_to_one_document(weights, seed):
    named = dict(zip("abc", weights, strict=True))
    mixture = _mixture(seed, named)
    longest = max(map(max, LENGTHS.values()))
    total_weight = sum(weights)
    for _ in range(300):
        mixture.draw()
        total = sum(mixture.consumed.values())
        for name, consumed in mixture.consumed.items():
            # Never ahead of its share by more than the document that took it there.
            assert consumed - named[name] / total_weight * total <= longest + 1e-3
    assert all(
        consumed > 0 for name, consumed in mixture.consumed.items() if named[name] > total_weight / 100
    )


def test_an_epoch_visits_every_document_once_in_a_new_order():
    mixture = _mixture()
    visits: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(400):
        drawn = mixture.draw()
        visits[drawn.source].append(drawn.document)
        assert drawn.length == LENGTHS["abc"[drawn.source]][drawn.document]
    orders = set()
    for source, name in enumerate("abc"):
        n = len(LENGTHS[name])
        for start in range(0, len(visits[source]) - n, n):
            epoch = visits[source][start : start + n]
            assert sorted(epoch) == list(range(n))
            orders.add((source, tuple(epoch)))
    assert len([o for o in orders if o[0] == 0]) > 10
    assert mixture.epochs["b"] == len(visits[1]) / 2


@given(st.integers(0, 120))
def test_state_continues_the_stream(drawn_before):
    mixture = _mixture(seed=3)
    for _ in range(drawn_before):
        mixture.draw()
    state = json.loads(json.dumps(mixture.state_dict()))
    expected = [mixture.draw() for _ in range(50)]
    fresh = _mixture(seed=3)
    fresh.load_state_dict(state)
    assert [fresh.draw() for _ in range(50)] == expected


@given(st.integers(0, 2000))
def test_seek_finds_the_token(token):
    mixture = _mixture()
    at, drawn = 0, mixture.draw()
    while at + drawn.length <= token:
        at += drawn.length
        drawn = mixture.draw()
    sought = _mixture()
    sought.draw()
    assert sought.seek(token) == (drawn, token - at)
    assert sought.state_dict() == mixture.state_dict()


def test_the_seed_orders_documents_not_sources():
    first, second = _mixture(seed=1), _mixture(seed=2)
    assert [first.draw() for _ in range(40)] != [second.draw() for _ in range(40)]


def test_what_does_not_fit_is_refused():
    state = _mixture().state_dict()
    with pytest.raises(UserError, match="saved position has seed 0, this run has 4"):
        _mixture(seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="as weight of a"):
        _mixture(weights={"a": 9.0, "b": 2.0, "c": 0.5}).load_state_dict(state)
    smaller = Mixture({"a": 4, "b": 1, "c": 3}, lambda n, i: 1, WEIGHTS, 0)
    with pytest.raises(UserError, match="saved position has 2 as documents of b, this run has 1"):
        smaller.load_state_dict(state)
    with pytest.raises(UserError, match=r"sources \['a', 'b', 'c'\], this run has \['a'\]"):
        Mixture({"a": 4}, lambda n, i: 1, {"a": 1.0}, 0).load_state_dict(state)
    with pytest.raises(UserError, match=r"weights must name the sources \['a'\], got \['b'\]"):
        Mixture({"a": 1}, lambda n, i: 1, {"b": 1.0}, 0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="weight of a must be positive and finite"):
            Mixture({"a": 1}, lambda n, i: 1, {"a": weight}, 0)
    with pytest.raises(UserError, match="source a holds no documents"):
        Mixture({"a": 0}, lambda n, i: 1, {"a": 1.0}, 0)
