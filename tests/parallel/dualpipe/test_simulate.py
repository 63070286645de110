"""The simulator: start times by a slow definition, hand-made cases, latency, unequal stages, memory, critical path."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops.parallel.dualpipe import (
    NAMES,
    Costs,
    Kind,
    Link,
    Pair,
    generate,
    ops,
    parse_costs,
    simulate,
)


def slow_ends(schedule, cost, latency):
    """End of every op by relaxing all dependencies, written out without the schedule's messages, until nothing changes."""
    ends = {op: 0.0 for order in schedule.orders for action in order for op in ops(action)}
    changed = True
    while changed:
        changed = False
        for rank, order in enumerate(schedule.orders):
            before = 0.0
            for action in order:
                start = before
                for op in ops(action):
                    forth = op.kind is Kind.F
                    if op.kind is Kind.W or op.stage == (0 if forth else schedule.stages - 1):
                        continue
                    stage = op.stage + (-1 if forth else 1)
                    away = schedule.placement[op.direction][stage] != rank
                    kinds = (Kind.F,) if forth else (Kind.B, Kind.BI)
                    made = [op._replace(kind=kind, stage=stage) for kind in kinds]
                    start = max(start, next(ends[other] for other in made if other in ends) + away * latency)
                before = start + cost(action)
                for op in ops(action):
                    changed |= ends[op] != before
                    ends[op] = before
    return ends


@given(
    st.sampled_from(NAMES),
    st.sampled_from([2, 4]),
    st.lists(st.integers(1, 5), min_size=8, max_size=8),
    st.sampled_from([0.0, 0.5]),
)
def test_times_are_longest_paths(name, ranks, times, latency):
    schedule = generate(name, ranks, 4 * ranks)
    forward = (times * 2)[: schedule.stages]
    backward = [2.0 * time + 1 for time in forward]
    weight = [time + 0.5 for time in forward]

    def cost(action):
        if isinstance(action, Pair):
            return forward[action.forward.stage] + backward[action.backward.stage]
        b, w = backward[action.stage], weight[action.stage]
        return {Kind.F: forward[action.stage], Kind.B: b, Kind.BI: b - w, Kind.W: w}[action.kind]

    timeline = simulate(schedule, Costs(forward, backward, weight), Link(latency))
    ends = slow_ends(schedule, cost, latency)
    for spans in timeline.spans:
        for span in spans:
            assert all(ends[op] == pytest.approx(span.end) for op in ops(span.action))
            assert span.end - span.start == pytest.approx(cost(span.action))
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    path = timeline.critical_path
    assert path[0][1].start == 0 and path[-1][1].end == timeline.total
    for (before_rank, before), (after_rank, after) in itertools.pairwise(path):
        assert after.start == pytest.approx(before.end + latency * (before_rank != after_rank))


def test_two_ranks_by_hand():
    """1F1B, 2 ranks, 2 micro-batches, F = 1, B = 2: F F . B B B B over . F B B F B B ."""
    timeline = simulate(generate("1f1b", 2, 2))
    assert [[(str(s.action), s.start, s.end) for s in spans] for spans in timeline.spans] == [
        [("F0@0", 0, 1), ("F1@0", 1, 2), ("B0@0", 4, 6), ("B1@0", 7, 9)],
        [("F0@1", 1, 2), ("B0@1", 2, 4), ("F1@1", 4, 5), ("B1@1", 5, 7)],
    ]
    assert (timeline.total, timeline.busy, timeline.bubble) == (9, (6, 6), (3, 3))
    assert timeline.bubble_share == 1 / 3
    assert [f"{rank}:{span.action}" for rank, span in timeline.critical_path] == [
        "0:F0@0",
        "1:F0@1",
        "1:B0@1",
        "1:F1@1",
        "1:B1@1",
        "0:B1@0",
    ]


def test_the_steady_state_does_not_absorb_latency():
    """Eight stages, sends of c = 0.1 F: the bubble grows by 7/8 c per micro-batch in DualPipe and 3/4 c in DualPipeV.

    The research notes found 8.8 and 16.0 for V at 32 and 128 micro-batches (6 without latency). ZB1P runs further
    ahead of what it waits for, and grows not at all.
    """

    def bubble(name, ranks, microbatches):
        return max(simulate(generate(name, ranks, microbatches), link=Link(0.1)).bubble)

    assert [bubble("dualpipev", 4, 32 // 2), bubble("dualpipev", 4, 128 // 2)] == pytest.approx([8.8, 16.0])
    for name, ranks, rate in (("dualpipe", 8, 7 / 8), ("zb1p", 8, 0)):
        grown = bubble(name, ranks, 128) - bubble(name, ranks, 32)
        assert grown == pytest.approx(rate * 0.1 * (128 - 32))


def test_blocking_sends_cost_what_others_hide():
    """The middle of a 1F1B step: a rank that stands in its sends is later by what it sends, and never earlier."""
    for name in NAMES:
        schedule = generate(name, 4, 8)
        free, held = (simulate(schedule, link=Link(0.25, blocking)) for blocking in (False, True))
        assert held.total > free.total
        for one, other in zip(free.spans, held.spans, strict=True):
            assert all(a.start <= b.start for a, b in zip(one, other, strict=True))


def test_one_slow_stage_sets_the_pace():
    """A stage twice as slow: the others wait for it, and the step takes what that stage's rank is busy for, and a little."""
    costs = Costs([1, 2, 1, 1], [2, 4, 2, 2], [1, 2, 1, 1])
    timeline = simulate(generate("1f1b", 4, 32), costs)
    assert timeline.busy == (96, 192, 96, 96)
    assert timeline.bubble[1] < 12
    assert timeline.bubble[0] >= 96
    assert sum(rank == 1 for rank, _ in timeline.critical_path) >= 60


def test_a_pair_hides():
    """F&B = 2.2 instead of 3: the steady state is that much shorter; of unequal stages a pair takes the same share."""
    schedule = generate("dualpipe", 4, 16)
    apart, hidden = simulate(schedule), simulate(schedule, Costs(pair=2.2))
    pairs = [sum(isinstance(action, Pair) for action in order) for order in schedule.orders]
    assert hidden.busy == pytest.approx([b - 0.8 * n for b, n in zip(apart.busy, pairs, strict=True)])
    uneven = Costs([1, 1, 1, 3], [2, 2, 2, 6], [1, 1, 1, 3], pair=2.25).by_stage(4)
    pair = next(action for action in schedule.orders[0] if isinstance(action, Pair))
    assert {pair.forward.stage, pair.backward.stage} == {0, 3}
    both = (1, 3)[pair.forward.stage == 3] + (2, 6)[pair.backward.stage == 3]
    assert uneven.of(pair) == pytest.approx(both * 2.25 / 4.5)


def test_memory_in_bytes():
    """Whole chunks while they wait for Bi, a share of them while they wait for W; per stage where stages are unequal."""
    timeline = simulate(generate("zb1p", 4, 8))
    assert timeline.peak_memory(10, 0) == (40, 30, 20, 10)  # freed after Bi: 1F1B's memory
    assert timeline.peak_memory(10, 10) == (40, 40, 40, 40)
    assert timeline.peak_deferred == (1, 2, 3, 4)
    assert timeline.peak_memory(10, 4) == (40, 34, 28, 22)  # the owed W's and the one whose Bi is at work
    assert simulate(generate("1f1b", 3, 3)).peak_memory([1, 10, 100], 0) == (3, 20, 100)


def test_costs_are_read_and_checked():
    costs = parse_costs("F=1,B=2.5,W=1,Bi=1.25,FB=3")
    assert costs == Costs(forward=1, backward=2.5, weight=1, input_gradient=1.25, pair=3)
    assert parse_costs("F=1/1/2") == Costs(forward=[1, 1, 2])
    assert parse_costs("") == Costs()
    for text, message in (
        ("G=1", r"costs: must be KEY=NUMBER with keys F, B, Bi, W, FB; got 'G=1'"),
        ("F=x", r"costs: must be KEY=NUMBER or KEY=NUMBER/NUMBER/..., one per stage; got 'F=x'"),
        ("F=1,F=2", r"costs: may give each key once; got 'F=1,F=2'"),
        ("FB=1/2", r"costs: FB is one number, for a stage of mean cost; got 'FB=1/2'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            parse_costs(text)
    for costs, message in (
        (Costs(forward=0), r"F: must be finite and above 0; got 0"),
        (Costs(forward=float("nan")), r"F: must be finite and above 0; got nan"),
        (Costs(weight=2), r"W: must be below B, whose part it is; got W=2, B=2.0"),
        (Costs(forward=[1, 2]), r"F: must be one number or 4, one per stage; got 2 numbers"),
        (Costs(pair=-1), r"FB: must be finite and above 0; got -1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            costs.by_stage(4)
    with pytest.raises(ArgumentError, match=r"latency: must be finite and not negative; got -1"):
        Link(-1)
