"""Cross entropy of a linear head without the logits: chunk after chunk of tokens, loss and gradients at once.

A chunk's logits are made, turned into probabilities in place by one fused softmax, then into the gradient of the
logits by subtracting 1 at the label, and used for both gradients while they are still in cache. What remains is
close to the three matrix products alone. Labels of -100 are dropped before any work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require
from .norm import inner_dtype

IGNORED = -100


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_dh: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, dh, dweight = _run(h, weight, labels, chunk, None, need_dh, need_dweight)
    return loss.sum(dtype=torch.float64).to(loss.dtype), dh, dweight


def linear_cross_entropy_tokens(h: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    return _run(h, weight, labels, chunk, None, False, False)[0]


def linear_cross_entropy_tokens_backward(
    dloss: Tensor, h: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_dh: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    _, dh, dweight = _run(h, weight, labels, chunk, dloss, need_dh, need_dweight)
    return dh, dweight


def _run(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    dloss: Tensor | None,
    need_dh: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per token, and the gradients of its sum, or of its sum weighted by `dloss`, where they are needed."""
    tokens, dtype = h.shape[0], inner_dtype(h)
    kept = (labels != IGNORED).nonzero().squeeze(1)
    some = kept.shape[0] < tokens  # otherwise the gathers below would be copies
    rows, targets = (h[kept], labels[kept]) if some else (h, labels)
    _check_labels(targets, weight.shape[0])
    if dloss is not None:
        dloss = dloss[kept, None] if some else dloss[:, None]

    loss = torch.empty(rows.shape[0], dtype=dtype, device=h.device)
    drows = torch.empty_like(rows, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=h.device) if need_dweight else h.new_empty(0)
    shape = (min(chunk, rows.shape[0]), weight.shape[0])
    buffer = torch.empty(shape, dtype=dtype, device=h.device)
    halves = h.new_empty((2, *shape) if h.dtype != dtype else (2, 0))
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, start + chunk)
        x, target = rows[part], targets[part, None]
        logits = _logits(x, weight, buffer[: x.shape[0]], halves[:, : x.shape[0]])
        at_label, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
        p = torch.softmax(logits, 1, out=logits)
        # The largest probability is exp(largest - logsumexp), at least 1 / V: its logarithm gives logsumexp back.
        loss[part] = (largest - p.amax(1, keepdim=True).log_() - at_label).squeeze(1)
        if not (need_dh or need_dweight):
            continue
        p.scatter_add_(1, target, p.new_full((), -1.0).expand(target.shape))
        if dloss is not None:
            p *= dloss[part]
        dlogits = p if p.dtype == h.dtype else halves[0, : x.shape[0]].copy_(p)
        if need_dh:
            torch.mm(dlogits, weight, out=drows[part])
        if need_dweight and dtype == h.dtype:
            dweight.addmm_(dlogits.t(), x)
        elif need_dweight:
            dweight += torch.mm(dlogits.t(), x)

    if some:
        loss = loss.new_zeros(tokens).index_copy_(0, kept, loss)
        drows = torch.zeros_like(h).index_copy_(0, kept, drows) if need_dh else drows
    return loss, drows, dweight.to(weight.dtype)


def _logits(x: Tensor, weight: Tensor, out: Tensor, halves: Tensor) -> Tensor:
    """x W^T with fp32 accuracy into `out`.

    A CPU multiplies bf16 four times faster than fp32 but rounds the result to bf16, too coarse for a softmax. Two
    bf16 products are still faster: the second starts from minus the first, so that what it accumulates in fp32 and
    rounds to bf16 is the first one's rounding error. Their sum is good to 2^-17 of a logit.
    """
    if x.dtype != torch.bfloat16:
        return torch.mm(x, weight.t(), out=out)
    high = torch.mm(x, weight.t(), out=halves[0])
    low = torch.neg(high, out=halves[1]).addmm_(x, weight.t())
    return out.copy_(high).add_(low)


def _check_labels(targets: Tensor, classes: int) -> None:
    if targets.numel():
        low, high = (int(v) for v in torch.aminmax(targets))
        require(
            low >= 0 and high < classes,
            "labels",
            f"must be in [0, {classes - 1}] or -100",
            f"[{low}, {high}]",
        )
