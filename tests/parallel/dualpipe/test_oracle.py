"""DualPipe and DualPipeV are the published ones: the eight phases as words, a frozen drawing, and torch's DualPipeV."""

import pytest

from deepseek_ops.parallel.dualpipe import Kind, Op, Pair, generate, simulate
from deepseek_ops.parallel.dualpipe.chart import text


def published(r, M, h):
    """The order of the rank at distance r from its end, as words; research notes on the public code, 6.1, taken literally.

    M micro-batches in each of the phases 0 and 1, h ranks per half. Phase 6 is told there by parity: the switch to
    input-only backward is before B1 of its round (r+1)//2 for odd r, and between B1 and B0 of that round for even r.
    """
    said = ["F0"] * (2 * (h - r - 1))
    said += ["F0", "F1"] * (r + 1)
    said += ["I1", "W", "F1"] * (h - r - 1)
    said += ["F0B1", "F1B0"] * (M - 2 * h + r + 1)
    if r == h - 1:
        at = said.index("F0B1")
        said[at : at + 1] = ["F0", "B1"]
    said += ["B1", "F1B0"] * (h - r - 1)
    for turn in range(r + 1):
        middle = (r + 1) // 2
        if r % 2 == 1:
            said += ["I1", "I0"] if turn >= middle else ["B1", "B0"]
        else:
            said += ["I1" if turn > middle else "B1", "I0" if turn >= middle else "B0"]
    said += ["W", "I0"] * (h - r - 1)
    said += ["W"] * (r + 1)
    return said


def numbered(said, place):
    """Words with stages and micro-batches: the n-th F or B (of any form) of a phase is micro-batch n, the n-th W is the n-th I."""
    out, deferred, paid = [], [], 0

    def op(kind, letters, phase, before):
        earlier = "".join(before)
        number = sum(earlier.count(letter + phase) for letter in letters)
        direction, stage = place(int(phase))
        return Op(kind, stage, number, direction)

    for at, word in enumerate(said):
        before = said[:at]
        if word == "W":
            out.append(deferred[paid]._replace(kind=Kind.W))
            paid += 1
        elif len(word) == 4:
            out.append(Pair(op(Kind.F, "F", word[1], before), op(Kind.B, "BI", word[3], before)))
        else:
            kind = {"F": Kind.F, "B": Kind.B, "I": Kind.BI}[word[0]]
            out.append(op(kind, "F" if kind is Kind.F else "BI", word[1], before))
            if kind is Kind.BI:
                deferred.append(out[-1])
    assert paid == len(deferred)
    return tuple(out)


def ranks_to_compare(ranks):
    """Every rank of short pipelines, ends, middle and one between of long ones: the oracle is quadratic."""
    if ranks <= 16:
        return range(ranks)
    return sorted({0, 1, ranks // 4, ranks // 2 - 1, ranks // 2, ranks - 2, ranks - 1})


@pytest.mark.parametrize("extra", [0, 2, None])
def test_dualpipe_is_the_published_order(extra):
    for ranks in range(2, 65, 2):
        microbatches = (2 * ranks + extra) if extra is not None else 3 * ranks
        schedule = generate("dualpipe", ranks, microbatches)
        for rank in ranks_to_compare(ranks):
            upper = rank >= ranks // 2

            def place(phase, rank=rank, ranks=ranks, upper=upper):
                direction = phase ^ upper
                return direction, ranks - 1 - rank if direction else rank

            said = published(min(rank, ranks - 1 - rank), microbatches // 2, ranks // 2)
            assert schedule.orders[rank] == numbered(said, place), (ranks, microbatches, rank)


@pytest.mark.parametrize("extra", [0, 3])
def test_dualpipev_is_the_published_order(extra):
    for ranks in range(1, 33):
        microbatches = 2 * ranks + extra
        schedule = generate("dualpipev", ranks, microbatches)
        for rank in ranks_to_compare(ranks):

            def place(phase, rank=rank, ranks=ranks):
                return 0, 2 * ranks - 1 - rank if phase else rank

            said = published(rank, microbatches, ranks)
            assert schedule.orders[rank] == numbered(said, place), (ranks, microbatches, rank)


def test_dualpipev_is_torchs():
    """torch.distributed.pipelining has a DualPipeV of its own, which knows nothing of our notes."""
    schedules = pytest.importorskip(
        "torch.distributed.pipelining.schedules", reason="this torch has no pipelining"
    )
    if not hasattr(schedules, "ScheduleDualPipeV"):
        pytest.skip("this torch has no ScheduleDualPipeV")
    kinds = {"FORWARD": Kind.F, "FULL_BACKWARD": Kind.B, "BACKWARD_INPUT": Kind.BI, "BACKWARD_WEIGHT": Kind.W}

    def ours(action):
        if action.sub_actions:
            return Pair(*(ours(part) for part in action.sub_actions))
        return Op(kinds[action.computation_type.name], action.stage_index, action.microbatch_index)

    for ranks, microbatches in [(1, 2), (2, 4), (2, 9), (3, 6), (4, 8), (5, 13), (8, 20), (16, 40), (32, 64)]:
        theirs = schedules.ScheduleDualPipeV.__new__(schedules.ScheduleDualPipeV)
        theirs.pp_group_size, theirs._n_microbatches = ranks, microbatches
        for rank, order in enumerate(generate("dualpipev", ranks, microbatches).orders):
            assert order == tuple(map(ours, theirs._calculate_single_rank_operations(rank))), (ranks, rank)


DRAWN = """\
rank 0  |F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 F7&b3=== .........f4&B0=== F8&b4=== f5&B1=== F9&b5=== f6&B2=== b6=== ...f7&B3=== b7=== ...f8&B4=== b8=== ...f9&B5=== b9=== I6 W6 I7 W7 I8 W8 I9 W9 |
rank 3  |.........F0 f0 F1 f1 F2 f2 F3 f3 F4 b0=== f4&B0=== F5&b1=== f5&B1=== F6&b2=== f6&B2=== F7&b3=== f7&B3=== F8&b4=== f8&B4=== F9&b5=== f9&B5=== b6=== B6=== ...b7=== B7=== ...i8 I8 ...i9 I9 w8 W8 w9 W9 |
"""


def test_the_step_of_figure_5():
    """8 ranks and 20 micro-batches, the case that the report draws: the rows of an end and of the middle, with their waits.

    Small letters are the reverse direction; the lower half of the drawing is its upper half with the directions swapped.
    """
    lines = text(simulate(generate("dualpipe", 8, 20))).splitlines()
    assert [lines[0], lines[3]] == DRAWN.splitlines()
    for rank in range(4):
        assert lines[7 - rank].partition("|")[2] == lines[rank].partition("|")[2].swapcase()
