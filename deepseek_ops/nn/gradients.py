"""Weight gradients in FP32, added up inside the Wgrad op (report 3.3.3: gradients accumulate in FP32).

The first micro-batch's gradient is an ordinary result: autograd makes it the weight's `.grad`, without a copy. Every further
one is added to `.grad` where it lies, by the kernel that computes it: D_new = D_old + acc, one FP32 rounding, the bits that
autograd's own addition would give, without a second gradient in memory and a pass over it. Nothing has to be switched on,
and any optimizer that reads `.grad` and sets it to None works.

The op adds only where nobody could tell the difference. These get an ordinary gradient instead: weights with hooks (tensor
hooks and post-accumulate hooks want to see each gradient), `torch.autograd.grad` and `backward(inputs=...)`, weights that
are not leaves, and a `.grad` that is not plain FP32. A weight used twice in one graph is summed in another order. Hooks on
autograd's accumulation node (DistributedDataParallel's) run in either case, after the addition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def weight_gradient(
    weight: Tensor, wgrad: Callable[..., Tensor], *operands: Tensor, accumulation: str
) -> Tensor | None:
    """What a backward pass returns for `weight`: its FP32 gradient, or None once it is in `weight.grad`."""
    if adds_in_place(weight):
        wgrad(*operands, out=weight.grad, accumulate=True, accumulation=accumulation)
        return None
    return wgrad(*operands, out_dtype=torch.float32, accumulation=accumulation)


def adds_in_place(weight: Tensor) -> bool:
    """Whether adding to `weight.grad`, inside a backward pass, is what autograd would do with the gradient."""
    if not weight.is_leaf or weight.grad is None:
        return False
    grad = weight.grad
    plain = type(grad) is Tensor and grad.dtype == torch.float32 and grad.layout == torch.strided
    if not plain or grad.requires_grad or grad.is_inference():
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return False
    try:
        node = torch.autograd.graph.get_gradient_edge(weight).node
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad: the gradient is wanted as a result
        return False
