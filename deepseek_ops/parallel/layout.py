"""Who holds what: PP x DP with EP inside DP, as plain numbers (report section 3.2: PP16, EP64 over 8 nodes, ZeRO-1 DP).

    rank = (pp * replicas + replica) * ep_size + ep            the EP index runs fastest, the pipeline index slowest

EP exchanges the most bytes, so its ranks are neighbours and fill as few nodes as can be; pipeline neighbours are `dp` ranks
apart, so that with whole nodes they have the same place in their nodes (the same rail of the network). EP is no axis
of its own but a part of DP: the ranks of one EP group see different tokens, share out the experts, and each hold all of the rest.

    parameter       copies of it are on                        a gradient is summed over
    dense           every rank that holds its stage            `dense_replicas(stage)`: DP (DualPipe: and the mirrored stage's)
    expert          one rank of each EP group                  `expert_replicas(stage, ep)`

No torch and no process group here: a layout is refused before anything is launched, with the rule that it breaks and the
nearest layout that breaks none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

# Those of `dualpipe.generate`; "interleaved" is there to compare with, and no rank of a layout holds its stages.
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")


class LayoutError(ValueError):
    """A layout breaks a rule. `nearest` is the closest one that breaks none, or None if there is none."""

    def __init__(self, message: str, nearest: Layout | None) -> None:
        super().__init__(message)
        self.nearest = nearest

    def __reduce__(self) -> tuple[Any, ...]:
        return LayoutError, (str(self), self.nearest)


class Coordinates(NamedTuple):
    """Where a rank stands: its place in the pipeline, its EP group among those of that place, its place in the EP group."""

    pp: int
    replica: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """A checked arrangement of `world` ranks; raises `LayoutError` where it is impossible.

    world: ranks in all. pp: pipeline ranks. ep: ranks that share out the experts, inside DP. node_size: ranks of one node.
    schedule: see `SCHEDULES`; "dualpipe" gives each rank two stages, its own and the mirrored one's (parameters twice),
    "dualpipev" two stages of 2 pp. Rules about the run are checked as far as it is known: micro_batches per step (both
    directions together), num_layers (main layers; a stage needs one), num_experts (routed, per layer).
    """

    world: int
    pp: int = 1
    ep: int = 1
    node_size: int = 8
    schedule: str = "1f1b"
    micro_batches: int | None = None
    num_layers: int | None = None
    num_experts: int | None = None

    def __post_init__(self) -> None:
        broken = next(_broken_rules(self), None)
        if broken is None:
            return
        argument, rule = broken
        near = _nearest(self)
        message = f"{argument}: {rule}; got {getattr(self, argument)} in {_short(self)}"
        raise LayoutError(f"{message}; nearest that fits: {_short(near) if near else 'none'}", near)

    # --- sizes ---------------------------------------------------------------------------------------------------

    @property
    def dp(self) -> int:
        """Ranks that see different tokens at the same place of the pipeline."""
        return self.world // self.pp

    @property
    def replicas(self) -> int:
        """EP groups at one place of the pipeline: how often each expert is there."""
        return self.dp // self.ep

    @property
    def local(self) -> int:
        """Ranks of one EP group in one node."""
        return min(self.ep, self.node_size)

    @property
    def ep_nodes(self) -> int:
        """Nodes over which one EP group stretches."""
        return self.ep // self.local

    @property
    def num_stages(self) -> int:
        """Stages that the layers are cut into."""
        return 2 * self.pp if self.schedule == "dualpipev" else self.pp

    def local_experts(self) -> int:
        """Experts per rank and layer."""
        if self.num_experts is None:
            raise ValueError("num_experts: must be given for this; got None")
        return self.num_experts // self.ep

    # --- rank <-> coordinates ------------------------------------------------------------------------------------

    def coordinates(self, rank: int) -> Coordinates:
        """Of a global rank."""
        self._check("rank", rank, self.world)
        rest, ep = divmod(rank, self.ep)
        pp, replica = divmod(rest, self.replicas)
        return Coordinates(pp, replica, ep)

    def rank(self, pp: int = 0, replica: int = 0, ep: int = 0) -> int:
        """The global rank at these coordinates."""
        for name, value, size in (
            ("pp", pp, self.pp),
            ("replica", replica, self.replicas),
            ("ep", ep, self.ep),
        ):
            self._check(name, value, size)
        return (pp * self.replicas + replica) * self.ep + ep

    def dp_index(self, rank: int) -> int:
        """Which part of the global batch a rank sees: 0 .. dp - 1."""
        self._check("rank", rank, self.world)
        return rank % self.dp

    def node(self, rank: int) -> int:
        """The node of a rank."""
        self._check("rank", rank, self.world)
        return rank // self.node_size

    # --- stages --------------------------------------------------------------------------------------------------

    def stages(self, pp: int) -> tuple[int, ...]:
        """Stages on pipeline rank `pp`, that of phase 0 first. With DualPipe rank 0 has embedding and head, as MTP wants."""
        self._check("pp", pp, self.pp)
        if self.schedule in ("dualpipe", "dualpipev"):
            return pp, self.num_stages - 1 - pp
        return (pp,)

    def holders(self, stage: int) -> tuple[int, ...]:
        """Pipeline ranks that hold a stage: two, mirrored, under DualPipe; else one."""
        self._check("stage", stage, self.num_stages)
        return tuple(pp for pp in range(self.pp) if stage in self.stages(pp))

    def mirror(self, rank: int) -> int | None:
        """Under DualPipe the rank that holds the same two stages, at the same place in DP; else None."""
        where = self.coordinates(rank)
        if self.schedule != "dualpipe":
            return None
        return self.rank(self.pp - 1 - where.pp, where.replica, where.ep)

    # --- who replicates what -------------------------------------------------------------------------------------

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share out the experts with `rank`, in EP order."""
        start = rank - self.coordinates(rank).ep
        return tuple(range(start, start + self.ep))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks at the same place of the pipeline."""
        start = self.coordinates(rank).pp * self.dp
        return tuple(range(start, start + self.dp))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """The pipeline that `rank` is a part of, first stage first."""
        return tuple(range(self.dp_index(rank), self.world, self.dp))

    def dense_replicas(self, stage: int) -> tuple[int, ...]:
        """Ranks with a copy of the stage's parameters other than experts, ascending."""
        return tuple(pp * self.dp + i for pp in self.holders(stage) for i in range(self.dp))

    def expert_replicas(self, stage: int, ep: int) -> tuple[int, ...]:
        """Ranks with a copy of the stage's experts number ep * E / EP and following, ascending."""
        self._check("ep", ep, self.ep)
        return tuple(self.rank(pp, i, ep) for pp in self.holders(stage) for i in range(self.replicas))

    def describe(self) -> str:
        """One line for logs."""
        return f"{_short(self)}: DP {self.dp}, {self.replicas} EP group(s) of {self.ep_nodes} node(s), {self.num_stages} stage(s)"

    def _check(self, name: str, value: int, size: int) -> None:
        if not 0 <= value < size:
            raise ValueError(f"{name}: must be in [0, {size}); got {value}")


def _broken_rules(a: Layout) -> Iterator[tuple[str, str]]:
    """(argument, rule) for every rule that is broken; the first ones guard the later ones against nonsense."""
    for field in fields(a):
        value = getattr(a, field.name)
        if isinstance(value, int) and value < 1:
            yield field.name, "must be at least 1"
            return
    if a.schedule not in SCHEDULES:
        yield "schedule", f"must be one of {', '.join(SCHEDULES)}"
        return
    if a.world > a.node_size and a.world % a.node_size:
        yield "world", f"must fill whole nodes of {a.node_size}"
    if a.world % a.pp:
        yield "pp", f"must divide the number of ranks ({a.world})"
        return
    if a.schedule == "dualpipe" and a.pp % 2:
        yield "pp", "must be even for dualpipe, where rank r mirrors rank pp - 1 - r"
    if a.dp % a.ep:
        yield "ep", f"must divide dp = world / pp = {a.dp}, for EP is a part of DP"
    node = min(a.node_size, a.world)
    if node % a.ep and a.ep % node:
        yield "ep", f"must divide the ranks of a node ({node}) or fill whole nodes"
    elif a.ep > node and a.dp % node:
        yield "ep", f"must start at the border of a node, but dp = {a.dp} is no multiple of {node}"
    if a.num_experts is not None and a.num_experts % a.ep:
        yield "ep", f"must divide the number of experts ({a.num_experts})"
    stages = a.num_stages
    if a.num_layers is not None and a.num_layers < stages:
        yield "pp", f"must leave a layer to each of the {stages} stages ({a.num_layers} layers)"
    if a.micro_batches is not None:
        if a.schedule == "dualpipe" and a.micro_batches % 2:
            yield "micro_batches", "must be even for dualpipe, half for each direction"
        least = 2 * a.pp if a.schedule.startswith("dualpipe") else a.pp
        if a.micro_batches < least:
            yield "micro_batches", f"must be at least {least} for {a.schedule} with pp = {a.pp}"


def _nearest(a: Layout) -> Layout | None:
    """The legal layout with the least change, in octaves, of what the caller chose; `world` only where it must."""
    if a.schedule not in SCHEDULES:
        return None
    node = max(a.node_size, 1)
    around = max(a.world, 1)
    worlds = (
        {around}
        if around <= node or around % node == 0
        else {around // node * node, -(-around // node) * node}
    )
    best: tuple[float, tuple[float, ...], Layout] | None = None
    for world in sorted(worlds):
        sizes = [n for n in range(1, world + 1) if world % n == 0]
        for pp, ep in itertools.product(sizes, sizes):
            if world // pp % ep:
                continue
            values = {**asdict(a), "world": world, "pp": pp, "ep": ep, "node_size": node}
            if a.micro_batches is not None:
                least = 2 * pp if a.schedule.startswith("dualpipe") else pp
                wanted = max(a.micro_batches, least)
                values["micro_batches"] = wanted + (wanted % 2 if a.schedule == "dualpipe" else 0)
            for name in ("num_layers", "num_experts"):
                if values[name] is not None:
                    values[name] = max(values[name], 1)
            candidate = _unchecked(values)
            if next(_broken_rules(candidate), None) is not None:
                continue
            pairs = [(world, around), (pp, a.pp), (ep, a.ep)]
            if a.micro_batches is not None:
                pairs.append((candidate.micro_batches or 1, a.micro_batches))
            changes = tuple(round(abs(math.log2(have / max(want, 1))), 9) for have, want in pairs)
            key = round(sum(changes), 9), changes
            if best is None or key < best[:2]:
                best = *key, candidate
    return None if best is None else replace(best[2])


def _unchecked(values: dict[str, object]) -> Layout:
    layout = object.__new__(Layout)
    for name, value in values.items():
        object.__setattr__(layout, name, value)
    return layout


def _short(a: Layout) -> str:
    text = f"world {a.world}, pp {a.pp}, ep {a.ep}, {a.schedule}"
    return text if a.micro_batches is None else f"{text}, {a.micro_batches} micro-batches"
