"""Generators: every legal argument gives a schedule that keeps all rules within its memory; the others are refused kindly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops.parallel.dualpipe import NAMES, Kind, Pair, generate, ops, verify


def bound(name, ranks, chunks):
    """Most activation chunks per rank."""
    return {
        "1f1b": [ranks - rank for rank in range(ranks)],
        "zb1p": ranks,
        "interleaved": ranks * (chunks + 1) - 1,
        "dualpipe": ranks + 1,
        "dualpipev": 2 * ranks + 1,
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_all_rules_for_pp_2_to_64(name):
    """The whole range, at the fewest micro-batches, with one message in flight per channel."""
    for ranks in (*range(2, 17), 31, 32, 47, 64):
        if (name == "dualpipe" and ranks % 2) or (name == "dualpipev" and ranks > 32):
            continue
        fewest = 2 * ranks if name.startswith("dualpipe") else ranks
        verify(generate(name, ranks, fewest), buffers=1, peak_chunks=bound(name, ranks, 2))


@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(0, 20), st.integers(2, 4))
def test_all_rules_for_any_number_of_microbatches(name, half, more, chunks):
    ranks = 2 * half
    count = {
        "dualpipe": 2 * ranks + 2 * more,
        "dualpipev": 2 * ranks + more,
        "interleaved": ranks * (1 + more % 4),
    }
    schedule = generate(name, ranks, count.get(name, ranks + more), chunks=chunks)
    verify(schedule, buffers=1, peak_chunks=bound(name, ranks, chunks))
    assert schedule.ranks == ranks


def test_pairs_are_the_steady_state():
    """Of M micro-batches through 2 stages each, a rank overlaps all but those of filling and draining: figure 5's frames."""
    for ranks, microbatches in ((4, 8), (8, 20), (16, 64)):
        for rank, order in enumerate(generate("dualpipe", ranks, microbatches).orders):
            depth = min(rank, ranks - 1 - rank)
            pairs = sum(isinstance(action, Pair) for action in order)
            expected = 2 * (microbatches // 2 - ranks + depth + 1) + (ranks // 2 - depth - 1)
            assert pairs == expected - (depth == ranks // 2 - 1)  # the middle ranks do the first one apart
            weights = [op for action in order for op in ops(action) if op.kind is Kind.W]
            assert len(weights) == ranks - 1 - depth  # split backward only where there is a wait to fill


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("dualpipe", 7, 20),
            "ranks: dualpipe needs an even number, at least 2; got 7 (nearest legal: 6 and 8)",
        ),
        (("dualpipe", 0, 20), "ranks: dualpipe needs an even number, at least 2; got 0 (nearest legal: 2)"),
        (
            ("dualpipe", 8, 19),
            "microbatches: dualpipe needs an even number, at least 2 x ranks = 16; got 19 (nearest legal: 18 and 20)",
        ),
        (
            ("dualpipe", 8, 15),
            "microbatches: dualpipe needs an even number, at least 2 x ranks = 16; got 15 (nearest legal: 16)",
        ),
        (
            ("dualpipev", 4, 7),
            "microbatches: dualpipev needs at least 2 x ranks = 8; got 7 (nearest legal: 8)",
        ),
        (("1f1b", 1, 8), "ranks: 1f1b needs at least 2; got 1 (nearest legal: 2)"),
        (("1f1b", 8, 7), "microbatches: 1f1b needs at least ranks = 8; got 7 (nearest legal: 8)"),
        (("zb1p", 8, -1), "microbatches: zb1p needs at least ranks = 8; got -1 (nearest legal: 8)"),
        (
            ("interleaved", 8, 20),
            "microbatches: interleaved needs a multiple of 8, at least ranks = 8; got 20 (nearest legal: 16 and 24)",
        ),
        (("1f1b", 4.0, 8), "ranks: 1f1b needs at least 2; got 4.0"),
        (("1f1b", True, 8), "ranks: 1f1b needs at least 2; got True"),
        (("gpipe", 4, 8), "schedule: must be one of dualpipe, dualpipev, 1f1b, interleaved, zb1p; got gpipe"),
    ],
)
def test_what_is_illegal_is_refused_with_the_nearest_legal_value(arguments, message):
    with pytest.raises(ArgumentError) as error:
        generate(*arguments)
    assert str(error.value) == message


def test_interleaved_needs_two_chunks():
    with pytest.raises(
        ArgumentError, match=r"chunks: interleaved needs at least 2; got 1 \(nearest legal: 2\)"
    ):
        generate("interleaved", 4, 8, chunks=1)
