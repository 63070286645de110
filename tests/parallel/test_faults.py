"""Every rank ends within its deadline, with an error that names rank and phase; and the groups are those of the layout."""

import os
import signal
import time

import pytest
import torch

from deepseek_ops.parallel.faults import ParallelError
from deepseek_ops.parallel.layout import Layout, LayoutError
from deepseek_ops.parallel.mesh import launch
from tests.parallel.rank import PATIENCE

LIMIT = 5.0


def groups(rendezvous, layout):
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        out = {}
        for name in ("world", "pp", "dp", "ep", "ep_node", "ep_rail", "dense", "expert"):
            group = getattr(mesh, name)
            mine = torch.tensor([mesh.rank])
            gathered = group.all_gather(mine, phase=name).tolist()
            assert gathered == list(group.ranks) and gathered[group.index] == mesh.rank
            assert int(group.all_reduce_(mine.clone(), phase=name)) == sum(gathered)
            # To the i-th rank i rows; from everybody as many as this one's place in the group.
            sent = torch.full((sum(range(group.size)), 2), mesh.rank)
            got = group.all_to_all(sent, list(range(group.size)), [group.index] * group.size, phase=name)
            if group.size > 1:
                assert got[:, 0].tolist() == [r for r in gathered for _ in range(group.index)]
            out[name] = gathered
        return out


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(3, ep=3),
        Layout(4, ep=2),
        Layout(4, ep=4, node_size=2),
        Layout(4, pp=2, ep=2, schedule="dualpipe"),
        Layout(4, pp=2, ep=1, schedule="dualpipev"),
    ],
    ids=lambda a: a.describe().split(":")[0],
)
def test_groups_are_the_layouts(world, layout):
    for rank, found in enumerate(world(layout.world, groups, layout)):
        where = layout.coordinates(rank)
        assert found["ep"] == list(layout.ep_group(rank)) and found["dp"] == list(layout.dp_group(rank))
        assert found["pp"] == list(layout.pp_group(rank))
        for stage in layout.stages(where.pp):
            assert found["dense"] == list(layout.dense_replicas(stage))
            assert found["expert"] == list(layout.expert_replicas(stage, where.ep))
        assert set(found["ep_node"]) & set(found["ep_rail"]) == {rank}
        assert len(found["ep_node"]) * len(found["ep_rail"]) == layout.ep
        assert {layout.node(r) for r in found["ep_node"]} == {layout.node(rank)}


def misfortune(rendezvous, what, victim):
    _, rank, size = rendezvous
    start = time.monotonic()
    try:
        with launch(Layout(size, ep=size), rendezvous=rendezvous, timeout=LIMIT) as mesh:
            mesh.world.all_reduce_(torch.ones(2), phase="warm-up")
            if rank == victim:
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if what == "error":
                    raise ValueError("a bad shard")
                if what == "absent":
                    time.sleep(2 * LIMIT)
                if what == "elsewhere":
                    mesh.world.all_gather(torch.ones(1), phase="another road")
            mesh.world.all_reduce_(torch.ones(100), phase="dispatch")
        return None
    except Exception as error:  # noqa: BLE001 (whatever it is, the test looks at it)
        suspects = getattr(error, "suspects", None)
        return type(error).__name__, str(error), suspects, time.monotonic() - start


@pytest.mark.parametrize("what", ["kill", "stop", "error"])
def test_a_rank_that_is_lost_is_named_by_all_others(world, what):
    victim = 1
    lost = () if what == "error" else (victim,)
    results = world(3, misfortune, what, victim, timeout=10 * LIMIT, lost=lost)
    for rank, result in enumerate(results):
        if rank == victim:
            assert what != "error" or result[:2] == ("ValueError", "a bad shard")
            continue
        name, message, suspects, seconds = result
        assert name == "ParallelError" and suspects == (victim,), message
        assert message.startswith(f"rank {rank}: dispatch: "), message
        assert f"rank {victim} seems to be the cause" in message
        assert ("a bad shard" if what == "error" else "no sign of life") in message
        assert seconds < 5 * LIMIT


def test_a_rank_that_is_late_is_told_from_one_that_is_dead(world):
    results = world(2, misfortune, "absent", 1, timeout=10 * LIMIT)
    name, message, suspects, _ = results[0]
    assert name == "ParallelError" and suspects == (1,) and "is alive in warm-up" in message
    assert results[1][0] == "ParallelError"  # it comes, and finds the others gone


def different(rendezvous, layouts, configs):
    _, rank, _ = rendezvous
    with launch(layouts[rank], config=configs[rank], rendezvous=rendezvous, timeout=LIMIT):
        pass


def test_ranks_that_would_run_different_things_do_not_start(world):
    same = [Layout(3, ep=3)] * 3
    configs = [{"train": {"lr": 1.0}}] * 2 + [{"train": {"lr": 2.0}}]
    for rank, error in enumerate(world(3, different, same, configs, errors=True)):
        assert isinstance(error, ParallelError) and error.suspects == (2,) and error.phase == "start"
        assert f"rank {rank}: start" in str(error) and "config.train.lr is 2.0 on rank 2, 1.0 on most" in str(
            error
        )
    layouts = [Layout(2, ep=2), Layout(2, ep=1)]
    for error in world(2, different, layouts, configs, errors=True):
        assert isinstance(error, ParallelError) and "layout.ep" in str(error)


def test_a_rank_that_never_comes(world):
    # Two of three: launched as a world of three, the third stays away.
    results = world(2, starts_short, errors=True, timeout=10 * LIMIT)
    for error in results:
        assert isinstance(error, ParallelError) and error.suspects == (2,) and "did not come" in str(error)


def starts_short(rendezvous):
    store, rank, _ = rendezvous
    with launch(Layout(3), rendezvous=(store, rank, 3), timeout=1.0):
        pass


def test_layout_for_another_number_of_processes():
    rule = r"world: must be the number of processes, 1; got 2"
    with pytest.raises(LayoutError, match=rule), launch(Layout(2)):
        pass


def test_alone_without_torchrun():
    with launch(Layout(1)) as mesh:
        x = torch.randn(3)
        assert torch.equal(mesh.dense.all_gather(x, phase="x"), x)
