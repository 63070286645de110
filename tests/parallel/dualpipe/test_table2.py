"""Table 2 of the report follows from the op lists: played, every schedule has the bubble, parameters and memory in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops.parallel.dualpipe import Costs, generate, simulate
from deepseek_ops.parallel.dualpipe.formulas import table2

UNIT = {"forward": 1, "backward": 2, "weight": 1, "pair": 3}


def play(name, stages, microbatches, **costs):
    ranks = stages // 2 if name == "dualpipev" else stages
    return simulate(generate(name, ranks, microbatches), Costs(**costs))


def microbatches(name, stages):
    """Few and more: what the bubble is does not depend on it."""
    return {
        "1f1b": (stages, stages + 3),
        "zb1p": (stages, stages + 3),
        "interleaved": (2 * stages, 3 * stages),
    }.get(name, (2 * stages, 2 * stages + 2))


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "interleaved", "dualpipe", "dualpipev"])
def test_every_row_for_pp_2_to_64(name):
    even = name.startswith("dualpipe")
    for stages in (*range(2, 13), 16, 31, 32, 64):
        if even and stages % 2:
            continue
        row = table2(name, stages, **UNIT)
        for count in microbatches(name, stages):
            timeline = play(name, stages, count)
            schedule = timeline.schedule
            part = 1 / 2 if name == "interleaved" else 1  # of a stage of the table
            assert max(timeline.bubble) * part == row.bubble
            assert min(timeline.bubble) == max(timeline.bubble)  # unit costs: every rank idles as long
            assert max(timeline.peak_chunks) * part == row.activations
            assert all(len(schedule.held(rank)) * part == row.parameters for rank in range(schedule.ranks))


def test_the_table_itself():
    """The report's cells, written out for PP = 8 with F = 1, B = 2, W = 1, F&B = 3."""
    cells = {
        name: table2(name, 8, **UNIT) for name in ("1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved")
    }
    assert {name: row.bubble for name, row in cells.items()} == {
        "1f1b": 7 * 3,
        "zb1p": 7 * 1,
        "dualpipe": 3 * 2,
        "dualpipev": 3 * 2,
        "interleaved": 7 * 3 / 2,
    }
    assert [row.parameters for row in cells.values()] == [1, 1, 2, 2, 1]
    assert [row.activations for row in cells.values()] == [8, 8, 9, 9, 11.5]


def test_every_rank_of_dualpipe_keeps_one_chunk_more_than_ranks():
    """PP + 1 on all ranks alike, unlike 1F1B's PP, PP - 1, ..., 1; at most half of them wait for W."""
    for stages in (2, 4, 8, 30, 64):
        for name in ("dualpipe", "dualpipev"):
            timeline = play(name, stages, 2 * stages)
            assert set(timeline.peak_chunks) == {stages + 1}
            assert max(timeline.peak_deferred) == max(1, stages // 2)
        assert play("1f1b", stages, stages).peak_chunks == tuple(range(stages, 0, -1))
        assert play("zb1p", stages, stages).peak_chunks == (stages,) * stages


positive = st.floats(0.25, 4)
share = st.floats(0.1, 1)


@given(st.integers(2, 12), st.integers(0, 9), positive, positive, share)
def test_1f1b_and_zb1p_at_any_cost(stages, more, forward, input_gradient, share_of_weight):
    """1F1B's formula holds always, ZB1P's where W is no longer than F and Bi."""
    weight = share_of_weight * min(forward, input_gradient)
    backward = input_gradient + weight
    for name in ("1f1b", "zb1p"):
        timeline = play(name, stages, stages + more, forward=forward, backward=backward, weight=weight)
        row = table2(name, stages, forward=forward, backward=backward, weight=weight, pair=0)
        assert max(timeline.bubble) == pytest.approx(row.bubble, abs=1e-9)


@given(st.integers(1, 6), st.integers(0, 9), positive, share, st.floats(0, 1))
def test_dualpipe_where_its_formula_is_exact(half, more, forward, share_of_weight, hidden):
    """F = Bi, W no longer than F, and F&B between B and F + B: the rank that idles most idles as the table says."""
    weight = share_of_weight * forward
    backward = forward + weight
    pair = backward + hidden * forward
    for name, count in (("dualpipe", 4 * half + 2 * more), ("dualpipev", 4 * half + more)):
        timeline = play(name, 2 * half, count, forward=forward, backward=backward, weight=weight, pair=pair)
        row = table2(name, 2 * half, forward=forward, backward=backward, weight=weight, pair=pair)
        assert max(timeline.bubble) == pytest.approx(row.bubble, abs=1e-9)


def test_where_dualpipes_formula_is_only_near():
    """F = 1, B = 3, W = 1, F&B = 4: the replay idles one chunk less than (PP/2 - 1)(F&B + B - 3W), whatever PP is."""
    for stages in (4, 8, 16, 32):
        timeline = play("dualpipe", stages, 2 * stages, forward=1, backward=3, weight=1)
        assert max(timeline.bubble) == (stages // 2 - 1) * (4 + 3 - 3) - 1
