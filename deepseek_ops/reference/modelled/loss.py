"""Cross entropy of a linear head as csrc/loss computes it (docs/numerics.md): bf16, the vocabulary in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import loss as reference
from ..loss import IGNORED
from ..tensor_core import tensor_core_accumulate
from .elementary import exp, log, reciprocal, sum_of_groups


def classes_of_chunk(tokens: int, classes: int, chunk: int) -> int:
    """How many classes kernels take at a time: as many logits as `chunk` tokens have, in whole tiles of 256."""
    fitting = chunk * classes // max(tokens, 1) // 256 * 256
    return min(max(fitting, 256), -(-classes // 8) * 8)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_dh: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if h.dtype != torch.bfloat16:
        return reference.linear_cross_entropy(h, weight, labels, chunk, need_dh, need_dweight)
    loss, dh, dweight = _run(h, weight, labels, chunk, None, need_dh, need_dweight)
    total = sum_of_groups(loss).float() if loss.numel() else loss.new_zeros(())
    return total, dh, dweight


def linear_cross_entropy_tokens(h: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    if h.dtype != torch.bfloat16:
        return reference.linear_cross_entropy_tokens(h, weight, labels, chunk)
    return _run(h, weight, labels, chunk, None, False, False)[0]


def linear_cross_entropy_tokens_backward(
    dloss: Tensor, h: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_dh: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    if h.dtype != torch.bfloat16:
        return reference.linear_cross_entropy_tokens_backward(
            dloss, h, weight, labels, chunk, need_dh, need_dweight
        )
    return _run(h, weight, labels, chunk, dloss, need_dh, need_dweight)[1:]


def _run(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    dloss: Tensor | None,
    need_dh: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), classes = h.shape, weight.shape[0]
    counts = labels != IGNORED
    reference._check_labels(labels[counts], classes)
    size = classes_of_chunk(tokens, classes, chunk)
    parts = [slice(first, min(first + size, classes)) for first in range(0, classes, size)]
    largest = h.new_full((tokens, 1), float("-inf"), dtype=torch.float32)
    total = h.new_zeros(tokens, dtype=torch.float64)
    at_label = h.new_zeros(tokens, dtype=torch.float32)
    rows = torch.arange(tokens, device=h.device)
    dh_sum = h.new_zeros((tokens, width), dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for part in parts if tokens else ():
        z = tensor_core_accumulate(h, weight[part])
        before, largest = largest, torch.maximum(largest, z.amax(1, keepdim=True))
        total = sum_of_groups(exp(z - largest)) + total * exp(before - largest).squeeze(1).double()
        inside = counts & (labels >= part.start) & (labels < part.stop)
        at_label[inside] = z[rows[inside], labels[inside] - part.start]
    loss = (largest.squeeze(1) - at_label) + log(total.float())
    loss = loss.masked_fill(~counts, 0.0)
    for part in reversed(parts) if need_dh or need_dweight else ():
        p = exp(tensor_core_accumulate(h, weight[part]) - largest) * reciprocal(total.float()).unsqueeze(1)
        inside = counts & (labels >= part.start) & (labels < part.stop)
        p[rows[inside], labels[inside] - part.start] -= 1.0
        if dloss is not None:
            p = p * dloss.unsqueeze(1)
        dlogits = p.masked_fill(~counts.unsqueeze(1), 0.0).to(torch.bfloat16)
        if need_dh:
            dh_sum += tensor_core_accumulate(dlogits, weight[part].mT)
        if need_dweight:
            dweight[part] = tensor_core_accumulate(dlogits.mT, h.mT).to(torch.bfloat16)
    return (
        loss,
        dh_sum.to(torch.bfloat16) if need_dh else h.new_empty(0),
        dweight if need_dweight else h.new_empty(0),
    )
