"""Layouts: every rank has one place, replicas partition the world, and what cannot be is refused with what can."""

import itertools

import pytest

from deepseek_ops.parallel.layout import SCHEDULES, Layout, LayoutError


def legal(world, **options):
    for pp, ep, schedule in itertools.product(range(1, world + 1), range(1, world + 1), SCHEDULES):
        try:
            yield Layout(world, pp=pp, ep=ep, schedule=schedule, **options)
        except LayoutError:
            continue


def test_the_reports_layout():
    a = Layout(2048, pp=16, ep=64, schedule="dualpipe", micro_batches=120, num_layers=61, num_experts=256)
    assert (a.dp, a.replicas, a.ep_nodes, a.local, a.local_experts()) == (128, 2, 8, 8, 4)
    assert a.stages(0) == (0, 15) and a.mirror(5) == 15 * 128 + 5
    assert len(a.dense_replicas(3)) == 256 and len(a.expert_replicas(3, 7)) == 4
    assert "2048" in a.describe()


@pytest.mark.parametrize(("world", "node_size"), [(1, 8), (2, 8), (4, 2), (6, 8), (8, 4), (12, 4)])
def test_ranks_and_coordinates(world, node_size):
    layouts = list(legal(world, node_size=node_size))
    assert layouts
    for a in layouts:
        assert [a.rank(*a.coordinates(r)) for r in range(world)] == list(range(world))
        for r in range(world):
            where = a.coordinates(r)
            assert (
                a.ep_group(r)[where.ep] == r
                and a.pp_group(r)[where.pp] == r
                and a.dp_group(r)[a.dp_index(r)] == r
            )
            assert a.dp_index(r) == where.replica * a.ep + where.ep
            # EP inside DP, and inside as few nodes as its size allows.
            assert set(a.ep_group(r)) <= set(a.dp_group(r))
            assert len({a.node(s) for s in a.ep_group(r)}) == a.ep_nodes


@pytest.mark.parametrize("world", [4, 8])
def test_every_parameter_has_its_copies_exactly_where_its_stage_is(world):
    for a in legal(world):
        held = {r: a.stages(a.coordinates(r).pp) for r in range(world)}
        for stage in range(a.num_stages):
            holders = [r for r in range(world) if stage in held[r]]
            assert list(a.dense_replicas(stage)) == holders
            groups = [a.expert_replicas(stage, ep) for ep in range(a.ep)]
            assert (
                sorted(itertools.chain(*groups)) == holders
            )  # a partition: each rank holds one share of the experts
            for ep, group in enumerate(groups):
                assert {a.coordinates(r).ep for r in group} == {ep}
            assert len(a.holders(stage)) == (2 if a.schedule == "dualpipe" else 1)
        for r in range(world):
            m = a.mirror(r)
            assert (m is None) == (a.schedule != "dualpipe")
            if m is not None:
                assert a.mirror(m) == r != m and set(held[m]) == set(held[r]) and held[m] == held[r][::-1]
                assert a.dp_index(m) == a.dp_index(r)


@pytest.mark.parametrize(
    ("options", "argument", "rule", "near"),
    [
        ({"world": 8, "pp": 3}, "pp", "must divide the number of ranks", {"pp": 4}),
        ({"world": 8, "pp": 2, "ep": 8}, "ep", "must divide dp = world / pp = 4", {"pp": 2, "ep": 4}),
        ({"world": 0}, "world", "at least 1", {"world": 1}),
        ({"world": 12}, "world", "whole nodes of 8", {"world": 16}),
        ({"world": 6, "pp": 3, "schedule": "dualpipe"}, "pp", "even for dualpipe", {"pp": 2}),
        ({"world": 24, "ep": 12}, "ep", "must divide the ranks of a node", {"ep": 8}),
        ({"world": 8, "ep": 8, "num_experts": 12}, "ep", "number of experts", {"ep": 4}),
        ({"world": 8, "pp": 8, "num_layers": 5}, "pp", "a layer to each", {"pp": 4}),
        ({"world": 4, "pp": 2, "schedule": "dualpipe", "micro_batches": 5}, "micro_batches", "even", {"micro_batches": 6}),
        ({"world": 4, "pp": 2, "schedule": "dualpipev", "micro_batches": 3}, "micro_batches", "at least 4", {"micro_batches": 4}),
        ({"world": 24, "pp": 2, "ep": 4, "node_size": 8, "schedule": "x"}, "schedule", "must be one of", None),
    ],
)  # fmt: skip
def test_the_impossible_is_refused_with_the_nearest_that_fits(options, argument, rule, near):
    with pytest.raises(LayoutError) as caught:
        Layout(**options)
    message = str(caught.value)
    assert message.startswith(f"{argument}: ") and rule in message and f"got {options[argument]}" in message
    found = caught.value.nearest
    if near is None:
        assert found is None
        return
    for name, value in near.items():
        assert getattr(found, name) == value, message
    assert "nearest that fits: world" in message


def test_whatever_is_asked_for_the_answer_is_legal():
    for world, pp, ep, m in itertools.product((1, 3, 6, 8, 20), (1, 2, 3, 5), (1, 2, 3, 8), (1, 4, 7)):
        for schedule in SCHEDULES:
            try:
                Layout(world, pp=pp, ep=ep, schedule=schedule, micro_batches=m, num_experts=16)
            except LayoutError as error:
                near = error.nearest
                if near is not None:
                    assert (
                        near.world == world or world > 8
                    )  # nobody is told to buy another machine without need
                    Layout(near.world, near.pp, near.ep, near.node_size, near.schedule, near.micro_batches)
                else:
                    assert schedule == "dualpipe" and world % 2


def test_out_of_range():
    a = Layout(4, pp=2)
    for call in (lambda: a.coordinates(4), lambda: a.rank(pp=2), lambda: a.stages(-1), lambda: a.holders(2)):
        with pytest.raises(ValueError, match=r"must be in \[0, "):
            call()
