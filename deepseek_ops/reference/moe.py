"""Routing, its balance loss and bias rule, and the permutation between tokens and experts (report section 2.1.2).

Everything is deterministic: ties go to the lowest index, sums over slots run in slot order, and counts are int64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import round_up
from .activation import row_chunks

EPSILON = (
    1e-20  # the released gate adds it to the sum of the chosen scores; here also to the sum of all scores
)
FEW_ROWS = 64  # up to here one topk is cheaper than passes over slots: decoding
FEW_SCORES = 4096  # up to here a stable sort is cheaper than making keys: decoding
TAKEN = torch.iinfo(torch.int64).min  # below the key of every float, of -inf too


def choice_keys(values: Tensor) -> Tensor:
    """int64 keys [T, E] in the order of (value, lower index first), all different within a row.

    With them, choosing is a vectorised ``amax`` per slot with the index in the result's low half. `torch.topk`
    leaves the choice among equals open, a stable sort costs several times more, and ``argmax`` is not vectorised.
    NaN of either sign orders above all numbers, as in torch's sorts. Values are compared in fp32.
    """
    values = values.float()
    bits = values.view(torch.int32).masked_fill(values.isnan(), 0x7FC00000)
    ordered = (
        (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    )  # integer order is now the order of floats
    low_half = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return ordered.to(torch.int64).bitwise_left_shift_(32).add_(low_half)


def key_index(keys: Tensor, columns: int) -> Tensor:
    return (columns - 1) - (keys & 0xFFFFFFFF)


def key_value(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).to(torch.int32)
    return (ordered >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(ordered).view(torch.float32)


def take_largest_(keys: Tensor, k: int) -> Tensor:
    """Indices of each row's k largest values, largest first, ties to the lowest index. Overwrites the keys."""
    if keys.shape[0] <= FEW_ROWS:
        return keys.topk(k).indices  # a row's keys are distinct, so there is no tie to break
    index = torch.empty((keys.shape[0], k), dtype=torch.int64, device=keys.device)
    for slot in range(k):
        best = key_index(keys.amax(1, keepdim=True), keys.shape[1])
        index[:, slot : slot + 1] = best
        keys.scatter_(1, best, TAKEN)
    return index


def group_scores(keys: Tensor, num_groups: int) -> Tensor:
    """Sum of the two largest biased scores of each group [T, G]; of the only one where a group has one expert."""
    groups = keys.view(keys.shape[0], num_groups, -1)
    first = groups.amax(2)
    score = key_value(first)
    if groups.shape[2] > 1:
        index = key_index(first, keys.shape[1])
        keys.scatter_(1, index, TAKEN)
        score += key_value(groups.amax(2))
        keys.scatter_(1, index, first)  # put back
    return score


def choose(biased: Tensor, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """Indices [T, k] of the chosen experts, best first, from biased scores [T, E]."""
    tokens = biased.shape[0]
    keys = choice_keys(biased)
    if top_groups < num_groups and tokens:
        groups = take_largest_(choice_keys(group_scores(keys, num_groups)), top_groups)
        ceiling = torch.full((tokens, num_groups), TAKEN, dtype=torch.int64, device=biased.device)
        ceiling.scatter_(1, groups, torch.iinfo(torch.int64).max)
        by_group = keys.view(tokens, num_groups, -1)
        torch.minimum(by_group, ceiling[..., None], out=by_group)
    return take_largest_(keys, top_k)


def choose_few_(biased: Tensor, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """`choose` in a third of the calls, by stable sorts, whose ties too go to the lowest index. Overwrites `biased`."""
    if top_groups < num_groups:
        by_group = biased.view(biased.shape[0], num_groups, -1)
        size = by_group.shape[2]
        score = by_group.topk(2).values.sum(2) if size > 1 else by_group.squeeze(2)
        others = score.sort(dim=1, descending=True, stable=True).indices[:, top_groups:, None]
        by_group.scatter_(1, others.expand(-1, -1, size), -torch.inf)
    return biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()


def route(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = logits.sigmoid().contiguous()
    biased = (scores + bias).float()
    few = 0 < biased.numel() <= FEW_SCORES
    topk_idx = (choose_few_ if few else choose)(biased, top_k, num_groups, top_groups)
    weight = scores.gather(1, topk_idx)
    if normalize:
        weight /= weight.sum(-1, keepdim=True).add_(EPSILON)
    weight *= scale
    return topk_idx, weight, scores, torch.bincount(topk_idx.flatten(), minlength=logits.shape[1])


def route_backward(
    dweight: Tensor, dscores: Tensor, scores: Tensor, topk_idx: Tensor, scale: float, normalize: bool
) -> Tensor:
    dchosen = dweight * scale
    if normalize:
        chosen = scores.gather(1, topk_idx)
        total = chosen.sum(-1, keepdim=True).add_(EPSILON)
        share = chosen.div_(total)
        dchosen = dchosen.sub_((dchosen * share).sum(-1, keepdim=True)).div_(total)
    dscores = dscores.scatter_add(1, topk_idx, dchosen)  # a row's experts are distinct: no order to depend on
    return torch.ops.aten.sigmoid_backward(dscores, scores)


def balance_loss(
    scores: Tensor, topk_idx: Tensor, cu_seqlens: Tensor, alpha: float, selection: str
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to scores.

    With ``c[s, i] = alpha f[s, i] / (N T_s)``, a constant for autograd, the loss is the sum over tokens t and
    experts i of ``c[seq(t), i] s'[t, i]``: one pass over the scores, and no P_i per sequence is ever summed.
    """
    tokens, num_experts = scores.shape
    top_k, sequences = topk_idx.shape[1], cu_seqlens.shape[0] - 1
    if selection == "unbiased":
        topk_idx = take_largest_(choice_keys(scores), top_k)
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    sequence = torch.where(sequence < 0, sequences, sequence)  # tokens of no sequence: the extra last bin

    bins = (sequence[:, None] * num_experts + topk_idx).flatten()
    counts = torch.bincount(bins, minlength=(sequences + 1) * num_experts).view(-1, num_experts)[:-1]
    lengths = cu_seqlens.diff().to(scores.dtype).clamp_min(1)[:, None]  # an empty one has counts of zero
    nonempty = (cu_seqlens.diff() > 0).sum().clamp_min(1)
    frequency = counts.to(scores.dtype) * num_experts / (top_k * lengths)
    constant = F.pad(frequency * alpha / (lengths * nonempty), (0, 0, 0, 1))[sequence]

    total = scores.sum(-1, keepdim=True).add_(EPSILON)
    share = scores / total
    per_token = (constant * share).sum(-1, keepdim=True)
    return per_token.sum(), constant.sub_(per_token).div_(total)


def update_bias_(bias: Tensor, counts: Tensor, speed: float) -> None:
    # In integers: floating-point counts or means would round, and the sign of a small difference with them.
    below_mean = counts.sum() - counts * counts.shape[0]
    bias.add_(below_mean.sign().to(bias.dtype), alpha=speed)


def permute(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert = topk_idx.flatten()
    expert = torch.where((expert < 0) | (expert >= num_experts), num_experts, expert)
    expert, source = expert.sort(stable=True)
    borders = torch.arange(num_experts + 1, device=expert.device)
    offsets = torch.searchsorted(expert, borders, out_int32=True)
    return x.index_select(0, source // topk_idx.shape[1]), offsets, source


def permute_quantized(
    q: Tensor, scale: Tensor, topk_idx: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, offsets, source = permute(q.view(torch.uint8), topk_idx, num_experts)
    rows = source.shape[0]
    scale_perm = scale.new_ones(scale.shape[0], round_up(rows, 4))  # padding 1
    torch.index_select(scale, 1, source // topk_idx.shape[1], out=scale_perm[:, :rows])
    return codes.view(q.dtype), scale_perm, offsets, source


def unpermute(y: Tensor, source: Tensor, num_tokens: int, top_k: int, weights: Tensor | None) -> Tensor:
    if y.numel() == 0:
        return y.new_zeros((num_tokens, y.shape[1]))
    row_of_slot = torch.empty_like(source)
    row_of_slot[source] = torch.arange(source.shape[0], device=source.device)
    inner = torch.float64 if y.dtype == torch.float64 else torch.float32
    # One pass: gather, weigh and add a token's rows in slot order, in fp32 (a bag of bf16 rows would round on the way).
    out = F.embedding_bag(
        row_of_slot.view(num_tokens, top_k), y.to(inner).contiguous(), mode="sum", per_sample_weights=weights
    )
    return out.to(y.dtype)


def unpermute_backward(
    dout: Tensor, y: Tensor | None, source: Tensor, top_k: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    token = source // top_k
    if weights is None or y is None:
        return dout.index_select(0, token), dout.new_empty(0)
    weight = weights.flatten()[source]
    dy, dweight = torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(weight)
    for part in row_chunks(*y.shape):
        grad = dout.index_select(0, token[part]).to(weight.dtype)
        torch.linalg.vecdot(grad, y[part].to(weight.dtype), out=dweight[part])
        dy[part] = grad.mul_(weight[part, None])
    dweights = torch.empty_like(weight)
    dweights[source] = dweight
    return dy, dweights.view(weights.shape)
