"""Expert parallelism: tokens travel to their experts and back (report 3.2.2, 3.3.3). The reference transport.

    ep = ExpertParallel(mesh, num_experts)
    plan = ep.plan(topk_idx)                                   # who goes where, in which slot; serves both passes
    rows, row_weight, offsets, _ = ep.dispatch(x, plan, topk_weight)
    y = experts(rows, row_weight, offsets)                     # rows lie sorted by expert: what grouped GEMMs take
    out = ep.combine(y, plan)                                  # [T, D], the sum over each token's experts

The path is the report's. A token crosses to a node once, to the rank at the same place of that node (`ep_rail`, InfiniBand),
and from there goes once to each rank that has one of its experts (`ep_node`, NVLink); only there is it copied for each expert.
Combine takes the same way back and adds up at each stop.

Rows of an expert lie by source rank, then token, then slot: the order of one process that has all tokens, so that a GEMM sees
the same operands. Dispatch and combine are each other's gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import E4M3, ceil_div, check_choice, check_range, check_tensor, require, round_up
from ..quantize import dequantize_1x128, quantize_1x128
from .expert_plan import Bounded, CapacityError, Groups, Plan

__all__ = ["Bounded", "CapacityError", "ExpertParallel", "Plan", "Received"]

Pair = tuple[Tensor, Tensor]
_ROWS = (torch.bfloat16, torch.float32, torch.float64)


class Received(NamedTuple):
    """What arrived, ready for a grouped GEMM. Rows of local expert e are offsets[e] up to offsets[e + 1].

    rows: [R, D], or a pair (e4m3 [R, D], GEMM-ready scales). row_weight: fp32 [R], None without weights.
    offsets: int32 [E_local + 1], on the device. dropped: int64 scalar on the device, see `Bounded`.
    Rows past offsets[E_local] (only with bounded capacity) are zeros.
    """

    rows: Any
    row_weight: Tensor | None
    offsets: Tensor
    dropped: Tensor


class ExpertParallel:
    """The transport of one EP group. Every call is collective over it, the constructor too: it compares its arguments.

    groups: a `Mesh`. num_experts: of the layer; rank i of the group has experts i E / EP and following.
    capacity: None for exact buffers (the host waits for counts), or `Bounded`.
    order: of combine's sum. "tree", the report's and what kernels do: experts of a rank by slot, ranks of a node, nodes, in
    FP32, rounded to y's dtype before each hop. "slots": every row travels alone and is added in slot order, at the price of
    its traffic; then a layer's results and gradients have the bits of one process.
    fp8: what dispatch sends, forward and as combine's gradient, is quantised to 1x128 tiles with power-of-two scales, and
    handed on dequantised, which FP8 experts quantise again without loss. Combine's way, both passes, keeps y's dtype (BF16).

    Every method takes `stream` (where to work; default the current one), `after` (an event to wait for first; default: all that
    the current stream has been given) and `num_sms` (what a kernel may use). Whoever gives a stream waits for it. On
    a CPU stream and event must be None; the reference has no use for num_sms.
    """

    def __init__(
        self,
        groups: Groups,
        num_experts: int,
        *,
        capacity: Bounded | None = None,
        order: str = "tree",
        fp8: bool = False,
    ) -> None:
        size = groups.ep.size
        check_range("num_experts", num_experts, low=1)
        require(
            num_experts % size == 0, "num_experts", f"must be a multiple of the {size} ranks", num_experts
        )
        check_choice("order", order, ("tree", "slots"))
        self.groups, self.num_experts, self.capacity, self.order, self.fp8 = (
            groups,
            num_experts,
            capacity,
            order,
            fp8,
        )
        groups.ep.agree("expert parallelism", [num_experts, str(capacity), order, fp8])

    @property
    def local_experts(self) -> range:
        """The experts of this rank."""
        count = self.num_experts // self.groups.ep.size
        return range(self.groups.ep.index * count, (self.groups.ep.index + 1) * count)

    def plan(
        self, topk_idx: Tensor, *, stream: Any = None, after: Any = None, num_sms: int | None = None
    ) -> Plan:
        """topk_idx: int64 [T, k]; an index outside [0, E) goes nowhere, a repeated one is a row of its own. T may differ by rank."""
        check_tensor("topk_idx", topk_idx, dtype=torch.int64, ndim=2)
        require(topk_idx.shape[1] >= 1, "topk_idx", "must have at least one column", tuple(topk_idx.shape))
        if self.capacity is not None:
            rule = f"must have at most max_tokens = {self.capacity.max_tokens} rows"
            require(topk_idx.shape[0] <= self.capacity.max_tokens, "topk_idx", rule, topk_idx.shape[0])
        with _issued(stream, after, num_sms):
            return Plan(topk_idx, self.groups, self.num_experts, self.capacity, self.order)

    def dispatch(
        self,
        x: Tensor | Pair,
        plan: Plan,
        weights: Tensor | None = None,
        *,
        stream: Any = None,
        after: Any = None,
        num_sms: int | None = None,
    ) -> Received:
        """x: [T, D] bf16, fp32 or fp64; or FP8, (e4m3 [T, D], scales) of `quantize_1x128`. weights: fp32 [T, k].

        Differentiable in x and weights. A pair arrives as a pair, without a gradient. Raises `ArgumentError`, `ParallelError`.
        """
        tokens, top_k = plan.num_tokens, plan.top_k
        if weights is not None:
            check_tensor("weights", weights, dtype=(torch.float32, torch.float64), shape=(tokens, top_k))
        with _issued(stream, after, num_sms):
            if isinstance(x, Tensor):
                check_tensor("x", x, dtype=_ROWS, shape=(tokens, None))
                rows, row_weight = _Dispatch.apply(x, weights, plan, self.fp8)
            else:
                check_tensor("x[0]", x[0], dtype=E4M3, shape=(tokens, None))
                check_tensor(
                    "x[1]",
                    x[1],
                    dtype=torch.float32,
                    shape=(ceil_div(x[0].shape[1], 128), round_up(tokens, 4)),
                )
                rows, row_weight = _Dispatch.apply(x, weights, plan, True)
        return Received(rows, row_weight, plan.offsets, plan.dropped)

    def combine(
        self, y: Tensor, plan: Plan, *, stream: Any = None, after: Any = None, num_sms: int | None = None
    ) -> Tensor:
        """y: [R, D], an expert's output for each row that was received -> [T, D], unweighted sums, in y's dtype.

        Differentiable in y. Raises `ArgumentError`, `ParallelError`.
        """
        check_tensor("y", y, dtype=_ROWS, shape=(plan.num_rows, None))
        with _issued(stream, after, num_sms):
            out: Tensor = _Combine.apply(y, plan, self.fp8)
        return out

    def routed(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Tensor,
        topk_weight: Tensor,
        topk_idx: Tensor,
    ) -> Tensor:
        """The whole layer: plan, dispatch, experts(rows, row_weight, offsets), combine; [T, D] -> [T, D]."""
        plan = self.plan(topk_idx)
        received = self.dispatch(x, plan, topk_weight)
        assert received.row_weight is not None
        return self.combine(experts(received.rows, received.row_weight, received.offsets), plan)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | Pair, weights: Tensor | None, plan: Plan, fp8: bool) -> tuple[Any, Any]:
        ctx.plan = plan
        return _send(x, weights, plan, fp8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_row_weight: Tensor) -> Any:
        plan = ctx.plan
        dx = plan.collect(d_rows) if ctx.needs_input_grad[0] else None
        dw = plan.total(plan.collect_slots(d_row_weight))[0] if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, fp8: bool) -> Tensor:
        ctx.plan, ctx.fp8 = plan, fp8
        return plan.collect(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return _send(d_out, None, ctx.plan, ctx.fp8)[0], None, None


def _send(x: Tensor | Pair, weights: Tensor | None, plan: Plan, fp8: bool) -> tuple[Any, Tensor | None]:
    """Rows as they arrive, by expert, and their weights."""
    payload: list[Tensor] = []
    if fp8:
        q, scale = quantize_1x128(x, pow2=True)[:2] if isinstance(x, Tensor) else x
        payload += [q, scale[:, : plan.num_tokens].T.contiguous()]
    else:
        assert isinstance(x, Tensor)
        payload.append(x)
    if weights is not None:
        payload.append(weights)
    arrived = plan.spread(*payload)
    rows: Any = plan.expand(arrived[0])
    if fp8:
        scales = rows.new_ones((arrived[1].shape[1], round_up(plan.num_rows, 4)), dtype=torch.float32)
        scale_rows = plan.expand(arrived[1])
        scales[:, : plan.num_rows] = torch.where(scale_rows == 0, 1.0, scale_rows).T  # 0: nobody's row
        rows = dequantize_1x128(rows, scales, dtype=x.dtype) if isinstance(x, Tensor) else (rows, scales)
    return rows, None if weights is None else plan.expand_slots(arrived[-1])


@contextlib.contextmanager
def _issued(stream: Any, after: Any, num_sms: int | None) -> Iterator[None]:
    """Work of the block goes to `stream`, after `after`."""
    if num_sms is not None:
        check_range("num_sms", num_sms, low=1)
    if stream is None:
        if after is not None:
            after.wait()
        yield
        return
    if after is None:
        stream.wait_stream(torch.cuda.current_stream())
    else:
        after.wait(stream)
    with torch.cuda.stream(stream):
        yield
