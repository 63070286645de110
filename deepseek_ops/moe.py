"""Mixture of experts: the router, its auxiliary-loss-free balance, and token permutation (report section 2.1.2).

    topk_idx, topk_weight, scores, counts = route(logits, bias, top_k=8, num_groups=8, top_groups=4, scale=2.5)
    x_perm, offsets, source = permute(x, topk_idx, num_experts)      # rows of one expert lie together
    y = ...                                                          # deepseek_ops.gemm.gemm_grouped(..., offsets)
    out = unpermute(y, source, num_tokens, top_k, topk_weight)
    update_bias_(bias, counts, speed=0.001)                          # once per step, counts summed over ranks

`permute_quantized` takes FP8 rows and their scales instead of x.

Routing runs in fp32 whatever the model's dtype (fp64 is accepted for checking gradients). All results repeat bit
by bit, and a token's result does not depend on the other tokens of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import E4M3, ceil_div, check_choice, check_range, check_tensor, fail, require, round_up
from ._registry import declare
from .reference import moe as reference
from .reference.modelled import moe as modelled

__all__ = [
    "balance_loss",
    "max_violation",
    "permute",
    "permute_quantized",
    "route",
    "unpermute",
    "update_bias_",
]

_SCORES = (torch.float32, torch.float64)
_ROWS = (torch.bfloat16, torch.float32, torch.float64)


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose ``top_k`` experts per token, with node-limited routing and the bias of the balance rule.

    logits: fp32 [T, E], affinity before the sigmoid. bias: fp32 [E], finite; it decides *which* experts are chosen
    and never enters a weight or a gradient.

    Expert i belongs to group ``i // (E / num_groups)``. A group's score is the sum of the two largest values of
    ``sigmoid(logits) + bias`` in it (of the only one if it has one expert). The report sums the largest K_r / M,
    which is 8 / 4 = 2; the released code has 2 in all cases, and so has this. Outside the ``top_groups`` best
    groups no expert can be chosen. Ties, of groups as of experts, go to the lowest index.

    Returns

    - topk_idx int64 [T, top_k], best biased score first;
    - topk_weight fp32 [T, top_k]: unbiased scores, divided by (their sum + 1e-20) if ``normalize``, times ``scale``;
    - scores fp32 [T, E] = sigmoid(logits), for `balance_loss`;
    - counts int64 [E]: how many tokens chose each expert (on the device; add them over micro-batches and ranks).

    topk_weight and scores are differentiable with respect to logits. NaN logits give valid indices and NaN weights.
    Raises `ArgumentError` for wrong shapes, dtypes or devices, for groups that do not divide E, and for ``top_k``
    above the number of experts in ``top_groups`` groups.
    """
    check_tensor("logits", logits, dtype=_SCORES, ndim=2)
    num_experts = logits.shape[1]
    if num_experts == 0:
        fail("logits", "must have at least one expert (column)", f"shape {tuple(logits.shape)}")
    check_tensor("bias", bias, dtype=logits.dtype, shape=(num_experts,), device=logits.device)
    check_range("num_groups", num_groups, low=1, high=num_experts)
    if num_experts % num_groups:
        fail("num_groups", f"must divide the number of experts ({num_experts})", num_groups)
    check_range("top_groups", top_groups, low=1, high=num_groups)
    check_range("top_k", top_k, low=1, high=top_groups * (num_experts // num_groups))
    return _route(logits, bias, top_k, num_groups, top_groups, float(scale), normalize)


def balance_loss(
    scores: Tensor, topk_idx: Tensor, cu_seqlens: Tensor, *, alpha: float, selection: str = "biased"
) -> Tensor:
    """Complementary sequence-wise balance loss, report eq. 17-20, as the mean over sequences; an fp32 scalar.

    For a sequence of T tokens: ``alpha * sum_i f_i P_i`` with ``f_i = E / (K T) * (number of its tokens that chose
    expert i)`` and ``P_i`` the mean over its tokens of ``s'_i = s_i / (sum_j s_j + 1e-20)``. Balanced: alpha.

    scores: fp32 [T, E] of `route`. topk_idx: int64 [T, K], values in [0, E). cu_seqlens: int32 [n+1]; sequence i is
    tokens cu_seqlens[i] up to cu_seqlens[i+1]. Empty sequences do not count in the mean; tokens of no sequence
    (padding after the last border) contribute nothing.

    selection: "biased" counts ``topk_idx``, the experts that really ran (what implementations do); "unbiased" counts
    the K best of the scores themselves, without groups, as eq. 18 is printed. The report leaves open which one ran.

    The gradient flows through P only, to ``scores``. Raises `ArgumentError`.
    """
    check_tensor("scores", scores, dtype=_SCORES, ndim=2)
    check_tensor("topk_idx", topk_idx, dtype=torch.int64, shape=(scores.shape[0], None), device=scores.device)
    rule = f"must have between 1 and {scores.shape[1]} columns (experts)"
    require(1 <= topk_idx.shape[1] <= scores.shape[1], "topk_idx", rule, f"shape {tuple(topk_idx.shape)}")
    check_tensor("cu_seqlens", cu_seqlens, dtype=torch.int32, ndim=1, device=scores.device)
    require(
        cu_seqlens.shape[0] >= 1,
        "cu_seqlens",
        "must have at least one element",
        f"shape {tuple(cu_seqlens.shape)}",
    )
    check_range("alpha", alpha, low=0)
    check_choice("selection", selection, ("biased", "unbiased"))
    loss: Tensor = _balance_loss(scores, topk_idx, cu_seqlens, float(alpha), selection)[0]
    return loss


def update_bias_(bias: Tensor, counts: Tensor, *, speed: float) -> Tensor:
    """Auxiliary-loss-free balance: ``bias += speed * sign(mean(counts) - counts)``, in place; returns ``bias``.

    bias: fp32 [E]. counts: int64 [E], tokens per expert over the whole batch of the step (all ranks). The comparison
    is exact for any counts with ``E * max(counts) < 2^63``; an expert exactly at the mean keeps its bias. The report
    uses speed 0.001 for the first 14.3T tokens, then 0. Raises `ArgumentError`.
    """
    check_tensor("bias", bias, dtype=torch.float32, ndim=1)
    require(
        not bias.requires_grad, "bias", "must not require a gradient (it is a buffer)", "requires_grad=True"
    )
    check_tensor("counts", counts, dtype=torch.int64, shape=bias.shape, device=bias.device)
    check_range("speed", speed, low=0)
    _update_bias_(bias, counts, float(speed))
    return bias


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = max(counts) / mean(counts) - 1 over the last axis; fp32, 0 where nothing was counted.

    counts: int64 [..., E], E >= 1 (stack layers in front). The result stays on the device. Raises `ArgumentError`.
    """
    check_tensor("counts", counts, dtype=torch.int64)
    require(
        counts.ndim >= 1 and counts.shape[-1] >= 1,
        "counts",
        "must have shape [..., E], E >= 1",
        tuple(counts.shape),
    )
    total = counts.sum(-1)
    largest = counts.amax(-1).double() * counts.shape[-1]
    return torch.where(total > 0, largest / total.clamp_min(1) - 1, 0.0).float()


def permute(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy every token once per chosen expert, in the order of experts.

    x: bf16, fp32 or fp64 [T, D]. topk_idx: int64 [T, k]. Returns

    - x_perm [T * k, D]: the rows of expert e are offsets[e] up to offsets[e+1], in token order;
    - offsets int32 [E + 1], on the device (never read by the host): what grouped GEMMs take;
    - source int64 [T * k]: row i of x_perm is token ``source[i] // k``, chosen in its slot ``source[i] % k``.

    An index outside [0, num_experts), such as -1, means "not here" (another rank's expert): its rows come last,
    past offsets[E], where grouped GEMMs do not read and leave zeros.

    Differentiable in x: a token's gradient is the sum over its slots in slot order, in fp32. Raises `ArgumentError`.
    """
    check_tensor("x", x, dtype=_ROWS, ndim=2)
    _check_assignment(topk_idx, num_experts, x)
    return _permute(x, topk_idx, num_experts)


def permute_quantized(
    q: Tensor, scale: Tensor, topk_idx: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`permute` of rows that are quantised already, with their scales: half the bytes of bf16 (report 3.3.2, figure 6).

    q: e4m3 [T, D] and scale: fp32 [ceil(D/128), round_up(T, 4)] of `quantize.quantize_1x128`. topk_idx: int64 [T, k].
    Returns (q_perm [T * k, D], scale_perm [ceil(D/128), round_up(T * k, 4)], offsets, source): codes and scales are
    copied, scale_perm is GEMM-ready with padding 1, offsets and source are those of `permute`.
    Not differentiable. Raises `ArgumentError`.
    """
    check_tensor("q", q, dtype=E4M3, ndim=2)
    shape = (ceil_div(q.shape[1], 128), round_up(q.shape[0], 4))
    check_tensor("scale", scale, dtype=torch.float32, shape=shape, device=q.device)
    _check_assignment(topk_idx, num_experts, q)
    return _permute_quantized(q, scale, topk_idx, num_experts)


def _check_assignment(topk_idx: Tensor, num_experts: int, rows: Tensor) -> None:
    check_tensor("topk_idx", topk_idx, dtype=torch.int64, shape=(rows.shape[0], None), device=rows.device)
    require(
        topk_idx.shape[1] >= 1, "topk_idx", "must have at least one column", f"shape {tuple(topk_idx.shape)}"
    )
    check_range("num_experts", num_experts, low=1)


def unpermute(
    y: Tensor, source: Tensor, num_tokens: int, top_k: int, weights: Tensor | None = None
) -> Tensor:
    """Bring expert outputs back to their tokens and add them up: the inverse of `permute`.

    y: [T * k, D] in the order of ``source`` (a permutation, from `permute`). weights: fp32 [T, k] or None for ones
    (when they were applied earlier, e.g. by `swiglu`). Returns [T, D] in y's dtype: ``sum_j weights[t, j] * y[row of
    (t, j)]`` with fp32 accumulation in slot order j = 0, 1, ..., rounded once.

    Differentiable in y and weights; y is kept for backward only if there are weights. fp64 weights go with fp64 y.
    Raises `ArgumentError`.
    """
    check_tensor("y", y, dtype=_ROWS, ndim=2)
    check_range("num_tokens", num_tokens, low=0)
    check_range("top_k", top_k, low=1)
    rule = f"must have num_tokens * top_k = {num_tokens * top_k} rows"
    require(y.shape[0] == num_tokens * top_k, "y", rule, f"shape {tuple(y.shape)}")
    check_tensor("source", source, dtype=torch.int64, shape=(y.shape[0],), device=y.device)
    if weights is not None:
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        check_tensor("weights", weights, dtype=dtype, shape=(num_tokens, top_k), device=y.device)
    result: Tensor = _unpermute(y, source, num_tokens, top_k, weights)
    return result


# Declarations: schema, meaning, shapes, gradient.


def _fake_route(logits: Tensor, bias: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    topk_idx = logits.new_empty(shape, dtype=torch.int64)
    counts = logits.new_empty(logits.shape[1], dtype=torch.int64)
    return topk_idx, logits.new_empty(shape), logits.new_empty(logits.shape), counts


def _save_route(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    topk_idx, _, scores, counts = outputs
    ctx.mark_non_differentiable(topk_idx, counts)
    ctx.save_for_backward(scores, topk_idx)
    ctx.scale, ctx.normalize = inputs[5], inputs[6]


def _backward_route(ctx: Any, _idx: Any, dweight: Tensor, dscores: Tensor, _counts: Any) -> tuple[Any, ...]:
    scores, topk_idx = ctx.saved_tensors
    dlogits = _route_backward(dweight, dscores, scores, topk_idx, ctx.scale, ctx.normalize)
    return dlogits, None, None, None, None, None, None


_route_backward = declare(
    "route_backward(Tensor dweight, Tensor dscores, Tensor scores, Tensor topk_idx, float scale, bool normalize)"
    " -> Tensor",
    reference=reference.route_backward,
    modelled=modelled.route_backward,
    fake=lambda dweight, dscores, scores, topk_idx, scale, normalize: scores.new_empty(scores.shape),
)
_route = declare(
    "route(Tensor logits, Tensor bias, int top_k, int num_groups, int top_groups, float scale, bool normalize)"
    " -> (Tensor topk_idx, Tensor topk_weight, Tensor scores, Tensor counts)",
    reference=reference.route,
    modelled=modelled.route,
    fake=_fake_route,
    save=_save_route,
    backward=_backward_route,
)


def _save_balance(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1])


def _backward_balance(ctx: Any, dloss: Tensor, _dscores: Any) -> tuple[Any, ...]:
    return ctx.saved_tensors[0] * dloss, None, None, None, None


_balance_loss = declare(
    "balance_loss(Tensor scores, Tensor topk_idx, Tensor cu_seqlens, float alpha, str selection)"
    " -> (Tensor loss, Tensor dscores)",
    reference=reference.balance_loss,
    modelled=modelled.balance_loss,
    fake=lambda scores, *_: (scores.new_empty(()), scores.new_empty(scores.shape)),
    save=_save_balance,
    backward=_backward_balance,
)
_update_bias_ = declare(
    "update_bias_(Tensor(a!) bias, Tensor counts, float speed) -> ()",
    reference=reference.update_bias_,
    fake=lambda bias, counts, speed: None,
)


def _fake_permute(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = topk_idx.shape[0] * topk_idx.shape[1]
    offsets = x.new_empty(num_experts + 1, dtype=torch.int32)
    return x.new_empty((rows, x.shape[1])), offsets, x.new_empty(rows, dtype=torch.int64)


def _fake_permute_quantized(
    q: Tensor, scale: Tensor, topk_idx: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_perm, offsets, source = _fake_permute(q, topk_idx, num_experts)
    return q_perm, scale.new_empty(scale.shape[0], round_up(source.shape[0], 4)), offsets, source


def _save_permute(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[1], outputs[2])
    ctx.save_for_backward(outputs[2])
    ctx.num_tokens, ctx.top_k = inputs[1].shape


def _backward_permute(ctx: Any, dx_perm: Tensor, _offsets: Any, _source: Any) -> tuple[Any, ...]:
    return _unpermute(dx_perm, ctx.saved_tensors[0], ctx.num_tokens, ctx.top_k, None), None, None


def _save_unpermute(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    y, source, _, ctx.top_k, weights = inputs
    ctx.save_for_backward(None if weights is None else y, source, weights)


def _backward_unpermute(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    y, source, weights = ctx.saved_tensors
    dy, dweights = _unpermute_backward(dout, y, source, ctx.top_k, weights)
    return dy, None, None, None, None if weights is None else dweights


def _fake_unpermute_backward(
    dout: Tensor, y: Tensor | None, source: Tensor, top_k: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    dweights = dout.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return dout.new_empty((source.shape[0], dout.shape[1])), dweights


_permute = declare(
    "permute(Tensor x, Tensor topk_idx, int num_experts) -> (Tensor x_perm, Tensor offsets, Tensor source)",
    reference=reference.permute,
    fake=_fake_permute,
    save=_save_permute,
    backward=_backward_permute,
)
_permute_quantized = declare(
    "permute_quantized(Tensor q, Tensor scale, Tensor topk_idx, int num_experts)"
    " -> (Tensor q_perm, Tensor scale_perm, Tensor offsets, Tensor source)",
    reference=reference.permute_quantized,
    fake=_fake_permute_quantized,
)
_unpermute_backward = declare(
    "unpermute_backward(Tensor dout, Tensor? y, Tensor source, int top_k, Tensor? weights)"
    " -> (Tensor dy, Tensor dweights)",
    reference=reference.unpermute_backward,
    modelled=modelled.unpermute_backward,
    fake=_fake_unpermute_backward,
)
_unpermute = declare(
    "unpermute(Tensor y, Tensor source, SymInt num_tokens, int top_k, Tensor? weights) -> Tensor",
    reference=reference.unpermute,
    modelled=modelled.unpermute,
    fake=lambda y, source, num_tokens, top_k, weights: y.new_empty((num_tokens, y.shape[1])),
    save=_save_unpermute,
    backward=_backward_unpermute,
)
