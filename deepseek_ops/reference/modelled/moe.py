"""The MoE plumbing with the bits of csrc/moe. fp64 inputs have no kernel: they run the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import moe as reference
from ..moe import EPSILON, choice_keys, choose, take_largest_
from ..tensor_core import fma
from . import elementary


def row_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension (docs/numerics.md, "Sums"), kept as a dimension."""
    return elementary.sum_of_groups(x).float().unsqueeze(-1)


def route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.dtype != torch.float32:
        return reference.route(logits, bias, top_k, num_groups, top_groups, scale, normalize)
    scores = elementary.sigmoid(logits).contiguous()
    topk_idx = choose(scores + bias, top_k, num_groups, top_groups)
    weight = scores.gather(1, topk_idx)
    if normalize:
        weight = weight / (row_sum(weight) + EPSILON)
    return topk_idx, weight * scale, scores, torch.bincount(topk_idx.flatten(), minlength=logits.shape[1])


def route_backward(
    dweight: Tensor, dscores: Tensor, scores: Tensor, topk_idx: Tensor, scale: float, normalize: bool
) -> Tensor:
    if scores.dtype != torch.float32:
        return reference.route_backward(dweight, dscores, scores, topk_idx, scale, normalize)
    dchosen = dweight * scale
    if normalize:
        chosen = scores.gather(1, topk_idx)
        total = row_sum(chosen) + EPSILON
        dchosen = (dchosen - row_sum(dchosen * (chosen / total))) / total
    return dscores.scatter_add(1, topk_idx, dchosen) * (1 - scores) * scores


def balance_loss(
    scores: Tensor, topk_idx: Tensor, cu_seqlens: Tensor, alpha: float, selection: str
) -> tuple[Tensor, Tensor]:
    if scores.dtype != torch.float32:
        return reference.balance_loss(scores, topk_idx, cu_seqlens, alpha, selection)
    tokens, num_experts = scores.shape
    top_k, sequences = topk_idx.shape[1], cu_seqlens.shape[0] - 1
    if selection == "unbiased":
        topk_idx = take_largest_(choice_keys(scores), top_k)
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
    inside = (sequence >= 0) & (sequence < sequences)
    bins = torch.where(inside, sequence, sequences)[:, None] * num_experts + topk_idx
    counts = torch.bincount(bins.flatten(), minlength=(sequences + 1) * num_experts).view(-1, num_experts)

    lengths = F.pad(cu_seqlens.diff(), (0, 1), value=1).float()
    nonempty = (cu_seqlens.diff() > 0).sum().float()
    first = torch.tensor(num_experts, dtype=torch.float32) * torch.tensor(alpha, dtype=torch.float32)
    factor = first / ((lengths * top_k) * (lengths * nonempty))  # of an empty sequence: not used
    row = torch.where(inside, sequence, sequences)
    constant = counts.float()[row] * factor[row, None]

    total = row_sum(scores) + EPSILON
    per_token = row_sum(constant * scores) / total
    dscores = (constant - per_token) * elementary.reciprocal(total)
    per_token = torch.where(inside, per_token[:, 0], 0.0)
    return elementary.sum_of_groups(per_token).float(), torch.where(inside[:, None], dscores, 0.0)


def unpermute(y: Tensor, source: Tensor, num_tokens: int, top_k: int, weights: Tensor | None) -> Tensor:
    if y.dtype == torch.float64:
        return reference.unpermute(y, source, num_tokens, top_k, weights)
    row_of_slot = torch.empty_like(source)
    row_of_slot[source] = torch.arange(source.shape[0], device=source.device)
    rows = row_of_slot.view(num_tokens, top_k)
    out = torch.zeros(num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
    for slot in range(top_k):
        term = y[rows[:, slot]].float()
        out = out + term if weights is None else fma(weights[:, slot, None], term, out)
    return out.to(y.dtype)


def unpermute_backward(
    dout: Tensor, y: Tensor | None, source: Tensor, top_k: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if weights is None or y is None or y.dtype == torch.float64:
        return reference.unpermute_backward(dout, y, source, top_k, weights)
    grad = dout[source // top_k].float()
    dweights = torch.empty(source.shape[0], dtype=torch.float32, device=y.device)
    dweights[source] = row_sum(grad * y.float())[:, 0]
    return (grad * weights.flatten()[source, None]).to(y.dtype), dweights.view(weights.shape)
