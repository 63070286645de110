"""The process groups of a layout, and the start and end of a parallel run (report 3.2).

    layout = Layout(world=4, pp=2, ep=2)
    with launch(layout, config=config, timeout=60) as mesh:      # under torchrun, or alone
        ...mesh.ep, mesh.dense, mesh.expert...

`launch` compares before it connects: what every rank thinks the run is (layout, config, versions) goes through the store, and
a difference is an error on all ranks that names the key. Groups with the same ranks are one process group, groups of one rank
none, so that a small layout opens few connections.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from .._checks import check_choice, require
from .._version import __version__
from .faults import ParallelError, Watch
from .group import Group
from .layout import Coordinates, Layout, LayoutError

__all__ = ["Layout", "LayoutError", "Mesh", "launch"]


@dataclass(frozen=True)
class Mesh:
    """The groups that a rank is in. All are there on every rank; many have one member.

    world: all ranks. pp: this rank's pipeline, first stage first. dp: same place of the pipeline. ep: shares out the experts.
    ep_node, ep_rail: ranks of `ep` in this node; ranks of `ep` at the same place of their nodes: the two hops of dispatch.
    dense: ranks with the same parameters other than experts. expert: ranks with the same experts.
    """

    layout: Layout
    rank: int
    where: Coordinates
    device: torch.device
    world: Group
    pp: Group
    dp: Group
    ep: Group
    ep_node: Group
    ep_rail: Group
    dense: Group
    expert: Group

    def device_mesh(self) -> DeviceMesh:
        """The same ranks as torch's DeviceMesh with axes pp, replica, ep, for DTensor and checkpoints. Opens its own groups: all ranks must call it."""
        a = self.layout
        ranks = torch.arange(a.world).view(a.pp, a.replicas, a.ep)
        return DeviceMesh(self.device.type, ranks, mesh_dim_names=("pp", "replica", "ep"))


def _group_ranks(layout: Layout, rank: int) -> dict[str, tuple[int, ...]]:
    """The ranks of every group of `Mesh` that `rank` is in."""
    ep, where = layout.ep_group(rank), layout.coordinates(rank)
    node, place = divmod(where.ep, layout.local)
    stage = layout.stages(where.pp)[0]
    return {
        "world": tuple(range(layout.world)),
        "pp": layout.pp_group(rank),
        "dp": layout.dp_group(rank),
        "ep": ep,
        "ep_node": ep[node * layout.local : (node + 1) * layout.local],
        "ep_rail": ep[place :: layout.local],
        "dense": layout.dense_replicas(stage),
        "expert": layout.expert_replicas(stage, where.ep),
    }


@contextlib.contextmanager
def launch(
    layout: Layout,
    *,
    config: Mapping[str, Any] | None = None,
    device: str = "cpu",
    timeout: float = 60.0,
    interval: float | None = None,
    rendezvous: tuple[Any, int, int] | None = None,
) -> Iterator[Mesh]:
    """Join the run as one of its ranks, and leave it at the end of the block. Once for each store: its keys are the run's.

    config: JSON-like; must be equal on all ranks. device: "cpu" (gloo) or "cuda" (NCCL, the card of LOCAL_RANK).
    timeout: seconds until any wait gives up. interval: seconds between two signs of life, default a twentieth of it.
    rendezvous: (store, rank, world); default torchrun's, or without torchrun a run of one.

    Raises `LayoutError` if the layout is not for this many processes, `ParallelError` for everything that has to do with other
    ranks. Errors of the block itself get a note with rank and phase, and the other ranks learn of them.
    """
    check_choice("device", device, ("cpu", "cuda"))
    require(timeout > 0, "timeout", "must be positive", timeout)
    require(interval is None or interval > 0, "interval", "must be positive", interval)
    store, rank, world = rendezvous or _rendezvous(timeout)
    if layout.world != world:
        raise LayoutError(f"world: must be the number of processes, {world}; got {layout.world}", None)
    store.set_timeout(timedelta(seconds=timeout))
    _compare(store, rank, world, layout, config, device)
    watch = Watch(store, rank, world, interval or min(1.0, timeout / 20))
    try:
        mesh = _connect(layout, rank, store, watch, device, timeout)
        mesh.world.barrier(phase="start")
        yield mesh
        watch.close()
    except BaseException as error:
        if not isinstance(error, ParallelError):
            error.add_note(f"rank {rank}, after phase {watch.phase!r}")
        suspects = error.suspects if isinstance(error, ParallelError) else ()
        watch.close(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", suspects)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _rendezvous(timeout: float) -> tuple[Any, int, int]:
    if "RANK" not in os.environ:
        return HashStore(), 0, 1
    # torchrun's agent hosts the store: it outlives every rank, and a restarted attempt has keys of its own.
    return next(iter(torch_rendezvous("env://", timeout=timedelta(seconds=timeout))))


def _compare(
    store: Any, rank: int, world: int, layout: Layout, config: Mapping[str, Any] | None, device: str
) -> None:
    """Raise on every rank unless all describe the same run."""
    described = {
        "layout": asdict(layout),
        "device": device,
        "config": config,
        "torch": torch.__version__,
        "deepseek_ops": __version__,
    }
    store.set(f"run/{rank}", json.dumps(described, sort_keys=True, default=str))
    keys = [f"run/{r}" for r in range(world)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        missing = [r for r in range(world) if not store.check([keys[r]])]
        message = f"rank {rank}: start: rank {', '.join(map(str, missing))} did not come within the timeout"
        raise ParallelError(message, rank, "start", missing) from error
    texts = [store.get(key).decode() for key in keys]
    usual = max(texts, key=texts.count)
    odd = [r for r, text in enumerate(texts) if text != usual]
    if odd:
        have, want = _flat(json.loads(texts[odd[0]])), _flat(json.loads(usual))
        names = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        differences = "; ".join(
            f"{k} is {have.get(k, 'absent')} on rank {odd[0]}, {want.get(k, 'absent')} on most"
            for k in names[:3]
        )
        message = f"rank {rank}: start: the ranks must run the same thing; rank {', '.join(map(str, odd))} differ(s): {differences}"
        raise ParallelError(message, rank, "start", odd)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _connect(layout: Layout, rank: int, store: Any, watch: Watch, device: str, timeout: float) -> Mesh:
    limit = timedelta(seconds=timeout)
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        torch.cuda.set_device(where)
    _guarded(
        watch,
        lambda: dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=PrefixStore("groups", store), rank=rank, world_size=layout.world, timeout=limit,
        ),
    )  # fmt: skip
    mine = _group_ranks(layout, rank)
    handles: dict[tuple[int, ...], Any] = {mine["world"]: dist.group.WORLD}
    for ranks in dict.fromkeys(g for r in range(layout.world) for g in _group_ranks(layout, r).values()):
        if len(ranks) > 1 and ranks not in handles:  # in the same order on every rank, members or not
            handles[ranks] = _guarded(watch, partial(dist.new_group, list(ranks), timeout=limit))
    groups = {
        name: Group(handles[ranks], ranks, rank, watch, timeout)
        if len(ranks) > 1
        else Group.alone(rank, watch)
        for name, ranks in mine.items()
    }
    return Mesh(layout, rank, layout.coordinates(rank), where, **groups)


def _guarded(watch: Watch, call: Callable[[], Any]) -> Any:
    watch.enter("start")
    try:
        return call()
    except RuntimeError as error:
        raise watch.failure("start", error) from error
