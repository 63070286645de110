"""ZeRO-1 AdamW: each replica of a parameter keeps a part of its optimizer state (report 3.2: ZeRO-1 DP; 3.3.3: FP32 and BF16).

Parameters are laid end to end in buckets, and a bucket is cut evenly among the ranks that replicate it: the dense ones over
`mesh.dense`, experts over `mesh.expert`. Of its part a rank keeps FP32 masters and both moments. A step is

    reduce   FP32 gradients of a bucket to their parts' ranks, summed in ascending rank order    packing overlaps the transfer
    norm     FP64 sums of squares of all parts of all ranks, added in ascending rank order
    update   `optimizer.adamw_` on the part
    gather   the new parameters, in their own type                                               transfers overlap the updates

A sum has one order, so that results repeat bit by bit; they are those of one process that adds the ranks' gradients in that order, but
for the norm, whose FP64 sum has another order (equal after rounding to FP32 but once in 2^25 or so).

Where a parameter is FP32 it is its own master: each rank has all of it and updates its part in place. A parameter without a
gradient on every rank that holds it stays as it is, as in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import require, round_up
from ..optimizer import adamw_
from .group import Group, Pending
from .mesh import Mesh

STATE = ("masters", "exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """What this rank keeps of one parameter: elements start .. stop of it, and the state of these (1-D)."""

    name: str
    start: int
    stop: int
    masters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class Bucket:
    """Parameters of one type and one group, end to end; rank i of the group has elements i span .. (i + 1) span."""

    group: Group
    dtype: torch.dtype
    device: torch.device
    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    size: int = 0
    pieces: list[Piece] = field(default_factory=list)
    grad: Tensor | None = None  # fp32 [span], summed over the group

    @property
    def span(self) -> int:
        """Elements of a rank."""
        return round_up(self.size, self.group.size) // self.group.size

    def place(self, piece: Piece) -> slice:
        """Where a piece lies in this rank's span."""
        begin = self.starts[self.names.index(piece.name)] + piece.start - self.group.index * self.span
        return slice(begin, begin + piece.stop - piece.start)


class ZeroAdamW:
    """AdamW over the parameters of this rank, by name; the calls are those of one process' optimizer.

    params: float32 or bfloat16, contiguous; the same names in the same order on all replicas. is_expert: whether a name is of
    routed experts, which only the ranks of `mesh.expert` replicate. moments: their type. weight_decay: one number, or by name.
    bucket: elements per transfer, about.

    Gradients come from `.grad`: call `accumulate` after each backward pass, then `norm`, `step`, `zero`. The loss must be
    scaled so that the ranks' gradients add up (divide by the tokens of the whole batch).
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        mesh: Mesh,
        *,
        is_expert: Callable[[str], bool],
        moments: torch.dtype = torch.bfloat16,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float | Mapping[str, float] = 0.1,
        bucket: int = 1 << 24,
    ) -> None:
        require(bucket >= 1, "bucket", "must be at least 1", bucket)
        self.mesh, self.params = mesh, dict(params)
        self.betas, self.eps, self.moments = (beta1, beta2), eps, moments
        self.grads: dict[str, Tensor] = {}
        if isinstance(weight_decay, Mapping):
            missing = [name for name in self.params if name not in weight_decay]
            require(
                not missing, "weight_decay", "must have every parameter", f"none for {', '.join(missing)}"
            )
            self.weight_decay = {name: float(weight_decay[name]) for name in self.params}
        else:
            self.weight_decay = dict.fromkeys(self.params, float(weight_decay))
        self.buckets: list[Bucket] = []
        for expert in (False, True):
            group = mesh.expert if expert else mesh.dense
            mine = {name: p for name, p in self.params.items() if is_expert(name) == expert}
            group.agree("parameters of ZeRO-1", [[n, list(p.shape), str(p.dtype)] for n, p in mine.items()])
            self.buckets += _fill(mine, group, bucket)
        for b in self.buckets:
            b.pieces = [
                self._piece(b, name, start, moments) for name, start in zip(b.names, b.starts, strict=True)
            ]
            b.pieces = [piece for piece in b.pieces if piece.stop > piece.start]

    def pieces(self) -> Iterator[Piece]:
        """All that this rank keeps: what a sharded checkpoint holds."""
        for b in self.buckets:
            yield from b.pieces

    # --- a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self) -> None:
        """Bring the parameters' gradients into FP32 sums over micro-batches; fp32 parameters sum in their own `.grad`."""
        for name, param in self.params.items():
            if param.grad is None:
                continue
            if param.dtype == torch.float32:
                self.grads[name] = param.grad
                continue
            if name in self.grads:
                self.grads[name].add_(param.grad)
            else:
                self.grads[name] = param.grad.float()
            param.grad = None

    @torch.no_grad()
    def norm(self, max_norm: float = math.inf) -> tuple[Tensor, Tensor]:
        """Sum the gradients over replicas; return the global norm and the factor that clips it, as `clip_grad_norm` does.

        Every element of every parameter of the run counts once, whatever is replicated. Both are fp32 scalars; a gradient that
        is not finite, on whichever rank, makes the factor NaN on all, and `step` then changes nothing anywhere.
        """
        require(max_norm > 0.0, "max_norm", "must be positive", max_norm)
        self._reduce()
        total = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        for b in self.buckets:
            assert b.grad is not None
            for part in b.grad.split(1 << 20):
                total += part.double().square().sum()
        sums = self.mesh.world.all_gather(total, phase="gradient norm")
        square = sums[0]
        for i in range(1, sums.shape[0]):
            square = square + sums[i]
        norm = square.sqrt().float()
        scale = torch.where(norm > max_norm, torch.full_like(norm, max_norm) / norm, torch.ones_like(norm))
        return norm, torch.where(torch.isfinite(norm), scale, torch.full_like(norm, math.nan))

    @torch.no_grad()
    def step(self, number: int, lr: float, scale: float | Tensor = 1.0) -> None:
        """One update (number counts from 1) with the gradients that `norm` summed, times scale; gathers the parameters."""
        gathers = []
        for b in self.buckets:
            require(b.grad is not None, "step", "must come after norm(), which sums the gradients", "no sums")
            assert b.grad is not None
            pieces = [piece for piece in b.pieces if piece.name in self._present]
            adamw_(
                [p.masters for p in pieces],
                [b.grad[b.place(p)] for p in pieces],
                [p.exp_avg for p in pieces],
                [p.exp_avg_sq for p in pieces],
                lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                weight_decay=[self.weight_decay[p.name] for p in pieces],
                step=number, grad_scale=scale,
            )  # fmt: skip
            gathers.append((b, *self._start_gather(b, "masters", b.dtype)))
            b.grad = None
        for b, flat, part, pending in gathers:
            pending.wait()
            del part
            for name, values in _views(b, flat, self.params):
                self.params[name].detach().copy_(values)

    def zero(self) -> None:
        """Forget the gradients."""
        self.grads.clear()
        for b in self.buckets:
            b.grad = None
        for param in self.params.values():
            param.grad = None

    # --- whole tensors -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def full_state(self) -> dict[str, dict[str, Tensor]]:
        """masters, exp_avg and exp_avg_sq of this rank's parameters, whole and by name; collective. Small models only."""
        state: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATE}
        for kind in STATE:
            for b in self.buckets:
                dtype = torch.float32 if kind == "masters" else self.moments
                flat, _, pending = self._start_gather(b, kind, dtype)
                pending.wait()
                state[kind].update((name, values.clone()) for name, values in _views(b, flat, self.params))
        return state

    @torch.no_grad()
    def load_full_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take this rank's pieces out of what `full_state` gave, on this layout or another; parameters follow the masters."""
        for kind in STATE:  # everything before anything is copied, and on every rank alike
            for name, param in self.params.items():
                have = state[kind].get(name)
                shape = None if have is None else tuple(have.shape)
                require(
                    shape == tuple(param.shape),
                    f"{kind}[{name!r}]",
                    f"must have shape {tuple(param.shape)}",
                    shape,
                )
        for piece in self.pieces():
            for kind in STATE:
                getattr(piece, kind).copy_(state[kind][piece.name].reshape(-1)[piece.start : piece.stop])
        for name, param in self.params.items():
            param.detach().copy_(state["masters"][name])

    # --- parts ---------------------------------------------------------------------------------------------------

    def _piece(self, b: Bucket, name: str, start: int, moments: torch.dtype) -> Piece:
        """The overlap of a parameter with this rank's span; start > stop never, start == stop if there is none."""
        param = self.params[name]
        low, high = b.group.index * b.span, (b.group.index + 1) * b.span
        first = min(max(low - start, 0), param.numel())
        last = max(min(high - start, param.numel()), first)
        values = param.detach().view(-1)[first:last]
        master = values if param.dtype == torch.float32 else values.float()
        zeros = torch.zeros_like(master, dtype=moments)
        return Piece(name, first, last, master, zeros, zeros.clone())

    def _reduce(self) -> None:
        """Gradients to the ranks of their parts; one bucket is packed while the one before travels."""
        self._present = self._find_present()
        travelling: list[tuple[Bucket, Tensor, Pending]] = []
        for b in self.buckets:
            flat = torch.zeros(b.span * b.group.size, dtype=torch.float32, device=b.device)
            for name, view in _views(b, flat, self.params):
                if name in self.grads:
                    view.copy_(self.grads[name])
            travelling.append(
                (b, *b.group.start_all_to_all(flat.view(b.group.size, b.span), phase="reduce gradients"))
            )
            if len(travelling) == 2:
                _finish(*travelling.pop(0))
        for last in travelling:
            _finish(*last)

    def _find_present(self) -> set[str]:
        """Names that have a gradient on some rank of their group."""
        present: set[str] = set()
        for group in dict.fromkeys(b.group for b in self.buckets):
            names = [name for b in self.buckets if b.group is group for name in b.names]
            have = torch.tensor(
                [name in self.grads for name in names], dtype=torch.int64, device=self.mesh.device
            )
            group.all_reduce_(have, phase="which gradients")
            present.update(name for name, count in zip(names, have.tolist(), strict=True) if count)
        return present

    def _start_gather(self, b: Bucket, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Pending]:
        """(whole bucket, this rank's part, what to wait for)."""
        part = torch.zeros(b.span, dtype=dtype, device=b.device)
        for piece in b.pieces:
            part[b.place(piece)] = getattr(piece, kind).to(dtype)
        flat = torch.empty(b.span * b.group.size, dtype=dtype, device=b.device)
        return flat, part, b.group.all_gather_into(flat, part, phase="gather parameters")


def _fill(params: Mapping[str, nn.Parameter], group: Group, limit: int) -> list[Bucket]:
    """Buckets of at most `limit` elements (a larger parameter has one of its own), in the parameters' order."""
    open_: dict[torch.dtype, Bucket] = {}
    buckets: list[Bucket] = []
    for name, param in params.items():
        rule = "must be contiguous float32 or bfloat16"
        require(
            param.dtype in (torch.float32, torch.bfloat16) and param.is_contiguous(), name, rule, param.dtype
        )
        b = open_.get(param.dtype)
        if b is None or (b.size and b.size + param.numel() > limit):
            b = open_[param.dtype] = Bucket(group, param.dtype, param.device)
            buckets.append(b)
        b.names.append(name)
        b.starts.append(b.size)
        b.size += param.numel()
    return buckets


def _views(b: Bucket, flat: Tensor, params: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for name, start in zip(b.names, b.starts, strict=True):
        shape = params[name].shape
        yield name, flat[start : start + shape.numel()].view(shape)


def _finish(b: Bucket, parts: Tensor, pending: Pending) -> None:
    """parts [ranks, span] -> the bucket's gradient: a sum in FP32, rank by rank."""
    pending.wait()
    b.grad = parts[0].clone()
    for part in parts[1:]:
        b.grad += part
