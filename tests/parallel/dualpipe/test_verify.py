"""The verifier: wrong schedules, planted one mistake at a time, are refused with the rank, the op and the rule."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops.parallel.dualpipe import (
    NAMES,
    Kind,
    Op,
    Pair,
    Schedule,
    ScheduleError,
    Stuck,
    generate,
    simulate,
    verify,
)

F, B, BI, W = Kind.F, Kind.B, Kind.BI, Kind.W


def edited(schedule, rank, edit):
    """The schedule with one rank's order changed by `edit`, a function of the list."""
    orders = [list(order) for order in schedule.orders]
    edit(orders[rank])
    return replace(schedule, orders=tuple(map(tuple, orders)))


def refusal(schedule, **options):
    with pytest.raises(ScheduleError) as error:
        verify(schedule, **options)
    return error.value


def swap(first, second):
    def edit(order):
        i, j = order.index(first), order.index(second)
        order[i], order[j] = order[j], order[i]

    return edit


DUAL = generate("dualpipe", 4, 8)


def test_a_missing_op():
    error = refusal(edited(DUAL, 2, lambda order: order.remove(Op(F, 2, 0))))
    assert (error.rule, error.rank) == ("once", 2)
    assert str(error) == "rank 2: F0@2 is missing (rule: once)"


def test_an_op_done_twice():
    error = refusal(edited(DUAL, 1, lambda order: order.insert(5, Op(F, 1, 0))))
    assert (error.rule, error.rank, error.position) == ("once", 1, 5)
    assert "F0@1 was op 0 already" in str(error)


def test_an_op_on_a_rank_that_does_not_hold_its_stage():
    error = refusal(edited(DUAL, 1, lambda order: order.insert(3, Op(F, 0, 0))))
    assert str(error) == "rank 1, op 3: F0@0 belongs to rank 0, which holds its stage (rule: once)"


@pytest.mark.parametrize("alien", [Op(F, 4, 0), Op(F, 1, 4), Op(F, 1, -1), Op(F, 1, 0, 2)])
def test_an_op_that_the_schedule_has_no_stage_or_microbatch_for(alien):
    error = refusal(edited(DUAL, 1, lambda order: order.insert(3, alien)))
    assert (error.rule, error.rank, error.position) == ("once", 1, 3)


def test_weights_forgotten_owed_to_nobody_or_done_twice():
    owed = next(op for op in DUAL.orders[0] if isinstance(op, Op) and op.kind is W)
    split = owed._replace(kind=BI)
    error = refusal(edited(DUAL, 0, lambda order: order.remove(owed)))
    assert (error.rule, error.rank) == ("once", 0)
    assert f"{owed} is missing, which {split} leaves owing" in str(error)
    assert DUAL.orders[0][error.position] == split
    error = refusal(edited(DUAL, 0, lambda order: order.remove(split)))
    assert f"{owed} has no {split}" in str(error)
    whole = owed._replace(kind=B)
    error = refusal(edited(DUAL, 0, lambda order: order.append(whole)))
    assert f"{split} does again what {whole} does" in str(error)


def test_backward_before_forward_and_weights_before_inputs():
    straight = generate("1f1b", 2, 2)
    error = refusal(edited(straight, 1, swap(Op(F, 1, 0), Op(B, 1, 0))))
    assert str(error) == "rank 1, op 0: B0@1 comes before F0@1 (rule: local)"
    owed = next(op for op in DUAL.orders[0] if isinstance(op, Op) and op.kind is W)
    error = refusal(edited(DUAL, 0, swap(owed, owed._replace(kind=BI))))
    assert (error.rule, error.rank) == ("local", 0)


def test_a_pair_that_cannot_run_together():
    straight = generate("1f1b", 2, 2)

    def fuse(order):
        at = order.index(Op(F, 1, 0))
        order[at : at + 2] = [Pair(Op(F, 1, 0), Op(B, 1, 0))]

    error = refusal(edited(straight, 1, fuse))
    assert str(error) == "rank 1, op 0: F0@1&B0@1 is no F with a B that can run beside it (rule: local)"


def test_messages_taken_in_another_order_than_sent():
    error = refusal(edited(generate("1f1b", 4, 8), 1, swap(Op(F, 1, 0), Op(F, 1, 1))))
    assert (error.rule, error.rank, error.position) == ("fifo", 1, 0)
    assert (
        "takes the activation of micro-batch 1 for stage 1, but rank 0 sends the activation of micro-batch 0"
        in str(error)
    )


def test_a_deadlock_is_told_as_a_circle():
    """Two ranks, each of which wants the other's gradient before it sends its own activation."""

    def late(order):
        order.remove(Op(F, 0, 2))
        order.insert(order.index(Op(B, 0, 1)) + 1, Op(F, 0, 2))
        order.remove(Op(F, 0, 1))
        order.insert(order.index(Op(B, 0, 0)) + 1, Op(F, 0, 1))

    def early(order):
        order.remove(Op(B, 1, 0))
        order.insert(order.index(Op(F, 1, 1)) + 1, Op(B, 1, 0))

    schedule = edited(edited(generate("1f1b", 2, 3), 0, late), 1, early)
    error = refusal(schedule, buffers=3)
    assert (error.rule, error.rank, error.position) == ("deadlock", 0, 1)
    assert str(error) == (
        "rank 0, op 1: waits in a circle: "
        "rank 0 at op 1 (B0@0) waits for the gradient of micro-batch 0 for stage 0; "
        "rank 1 at op 1 (F1@1) waits for the activation of micro-batch 1 for stage 1 (rule: deadlock)"
    )
    with pytest.raises(Stuck, match=r"rank 0 before B0@0, rank 1 before F1@1"):
        simulate(schedule)


def test_a_deadlock_of_full_buffers():
    """A rank that does all of one direction first fills its neighbour's mailbox; with room enough it is legal."""
    orders = (
        (*(Op(F, 0, m) for m in range(2)), *(Op(F, 1, m, 1) for m in range(2))),
        (*(Op(F, 0, m, 1) for m in range(2)), *(Op(F, 1, m) for m in range(2))),
    )
    backward = tuple(
        (*(Op(B, 1, m, 1 - r) for m in range(2)), *(Op(B, 0, m, r) for m in range(2))) for r in range(2)
    )
    schedule = Schedule(
        "both ways", 2, 4, ((0, 1), (1, 0)), tuple(a + b for a, b in zip(orders, backward, strict=True))
    )
    error = refusal(schedule, buffers=1)
    assert (error.rule, error.rank, error.position) == ("deadlock", 0, 1)
    assert (
        "rank 0 at op 1 (F1@0) waits to send the activation of micro-batch 1 for stage 1, whose channel is full (1)"
        in (str(error))
    )
    verify(schedule, buffers=2)
    with pytest.raises(ArgumentError, match="buffers: must be at least 1; got 0"):
        verify(schedule, buffers=0)


def test_too_much_memory():
    error = refusal(DUAL, peak_chunks=4)
    assert (error.rule, error.rank) == ("memory", 0)
    assert "makes 5 activation chunks alive; the bound is 4" in str(error)
    error = refusal(generate("1f1b", 4, 8), peak_chunks=[4, 3, 2, 0])
    assert (error.rank, error.position) == (3, 0)
    with pytest.raises(
        ArgumentError, match="peak_chunks: must be one number or 4, one per rank; got 3 numbers"
    ):
        verify(DUAL, peak_chunks=[9, 9, 9])


@given(st.sampled_from(NAMES), st.integers(0, 3), st.randoms(use_true_random=False))
def test_what_it_accepts_can_be_played_and_what_it_refuses_is_wrong(name, rank, random):
    """Swap any two ops of a rank: either the verifier names this rank or one that waits for it, or the step still plays."""
    schedule = generate(name, 4, 8)
    order = list(schedule.orders[rank])
    i, j = sorted(random.sample(range(len(order)), 2))
    assume(order[i] != order[j])
    order[i], order[j] = order[j], order[i]
    changed = edited(schedule, rank, lambda old: old.__setitem__(slice(None), order))
    try:
        verify(changed, buffers=64)
    except ScheduleError as error:
        assert error.rule in ("local", "fifo", "deadlock")
        if error.rule == "local":
            assert error.rank == rank and i <= error.position <= j
        if error.rule == "deadlock":
            with pytest.raises(Stuck):
                simulate(changed)
    else:
        assert simulate(changed).total >= max(simulate(changed).busy)
