"""Cross entropy of the output head, fused with its matrix product so that [T, V] logits never exist as a whole.

At V = 129280 the logits of a 4K sequence alone are 2 GiB in fp32, and their gradient as much again. Here both live
for one chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, check_range, check_tensor, require
from ._registry import declare
from .reference import loss as reference
from .reference.modelled import loss as modelled
from .reference.norm import inner_dtype

__all__ = ["linear_cross_entropy"]

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 256, reduction: str = "sum"
) -> Tensor:
    """``cross_entropy(h @ weight.T, labels)`` in chunks of ``chunk`` tokens; differentiable in h and weight.

    h: bf16, fp32 or fp64 [T, D]. weight: [V, D] in h's dtype. labels: int64 [T] in [0, V), or -100 for a token that
    does not count: its loss and gradient are 0, and the reference spends no work on it. The reference backend also
    checks the values of labels. Logits, softmax and sums are fp32 (fp64 for fp64); with bf16 operands the gradient
    of the logits is rounded to bf16 before its two matrix products, as tensor cores want it, and the gradient of
    the weight is summed over chunks in fp32.

    reduction:

    - "sum": fp32 scalar (divide it by your own count: the mean over a global batch is not a local matter). Forward
      computes the gradients with the loss, three matrix products in all; backward only scales them. Without
      a gradient to compute (`torch.no_grad`, frozen operands) forward is one product.
    - "none": fp32 [T]. Each token has its own incoming gradient, which the weight's gradient needs before the sum
      over tokens; so backward makes each chunk's logits again (a fourth product) instead of storing anything.

    The order of summation depends on the shapes and ``chunk`` only. 256 is the fastest on a CPU at V of a few thousand,
    and it hardly matters between 128 and 1024. Raises `ArgumentError`.

    Kernels take bf16 and cut the vocabulary instead of the tokens: as many classes at a time as make about the logits of
    ``chunk`` tokens, which is their workspace. So a chunk of the weight's gradient is written once; for gradients they make
    all but one chunk's logits a second time. They also work on tokens that do not count, whose h must be finite, and give
    a label outside of [0, V) the loss NaN.
    """
    check_tensor("h", h, dtype=_FLOATS, ndim=2)
    check_tensor("weight", weight, dtype=h.dtype, shape=(None, h.shape[1]), device=h.device)
    require(
        weight.shape[0] >= 1, "weight", "must have at least one row (class)", f"shape {tuple(weight.shape)}"
    )
    check_tensor("labels", labels, dtype=torch.int64, shape=(h.shape[0],), device=h.device)
    check_range("chunk", chunk, low=1)
    check_choice("reduction", reduction, ("sum", "none"))
    loss: Tensor
    if reduction == "none":
        loss = _tokens(h, weight, labels, chunk)
    else:
        grad = torch.is_grad_enabled()
        loss = _sum(h, weight, labels, chunk, grad and h.requires_grad, grad and weight.requires_grad)[0]
    return loss


# Declarations: schema, meaning, shapes, gradient.


def _fake_gradients(h: Tensor, weight: Tensor, need_dh: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    dh = h.new_empty(h.shape if need_dh else 0)
    return dh, weight.new_empty(weight.shape if need_dweight else 0)


def _fake_loss(h: Tensor, shape: Sequence[int]) -> Tensor:
    return h.new_empty(shape, dtype=inner_dtype(h))


def _save_sum(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    _, dh, dweight = outputs
    ctx.mark_non_differentiable(dh, dweight)
    ctx.set_materialize_grads(False)  # no zeros for the two gradients of gradients
    ctx.save_for_backward(dh, dweight)
    ctx.need_dh, ctx.need_dweight = inputs[4], inputs[5]


def _backward_sum(ctx: Any, dloss: Tensor | None, _dh: Any, _dweight: Any) -> tuple[Any, ...]:
    dh, dweight = ctx.saved_tensors
    if dloss is None:
        return None, None, None, None, None, None
    dh = dh * dloss if ctx.need_dh else None
    return dh, dweight * dloss if ctx.need_dweight else None, None, None, None, None


_sum = declare(
    "linear_cross_entropy(Tensor h, Tensor weight, Tensor labels, int chunk, bool need_dh, bool need_dweight)"
    " -> (Tensor loss, Tensor dh, Tensor dweight)",
    reference=reference.linear_cross_entropy,
    modelled=modelled.linear_cross_entropy,
    fake=lambda h, weight, labels, chunk, *need: (_fake_loss(h, ()), *_fake_gradients(h, weight, *need)),
    save=_save_sum,
    backward=_backward_sum,
)


def _save_tokens(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _backward_tokens(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
    need_dh, need_dweight = ctx.needs_input_grad[:2]
    dh, dweight = _tokens_backward(dloss, *ctx.saved_tensors, ctx.chunk, need_dh, need_dweight)
    return dh if need_dh else None, dweight if need_dweight else None, None, None


_tokens_backward = declare(
    "linear_cross_entropy_tokens_backward(Tensor dloss, Tensor h, Tensor weight, Tensor labels, int chunk,"
    " bool need_dh, bool need_dweight) -> (Tensor dh, Tensor dweight)",
    reference=reference.linear_cross_entropy_tokens_backward,
    modelled=modelled.linear_cross_entropy_tokens_backward,
    fake=lambda dloss, h, weight, labels, chunk, *need: _fake_gradients(h, weight, *need),
)
_tokens = declare(
    "linear_cross_entropy_tokens(Tensor h, Tensor weight, Tensor labels, int chunk) -> Tensor",
    reference=reference.linear_cross_entropy_tokens,
    modelled=modelled.linear_cross_entropy_tokens,
    fake=lambda h, weight, labels, chunk: _fake_loss(h, labels.shape),
    save=_save_tokens,
    backward=_backward_tokens,
)
