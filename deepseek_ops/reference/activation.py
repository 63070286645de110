"""SwiGLU with an optional weight per row, in fp32 whatever the dtype of the activations (fp64 for fp64)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import inner_dtype
from .quantize import (
    dequantize_1x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_1x128_128x1_grouped,
    quantize_128x1,
    quantize_128x1_grouped,
)

CHUNK_ELEMENTS = 1 << 18
FEW_ELEMENTS = 1 << 15  # up to here calls cost more than passes over memory: decoding


def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    dtype, inner = inner_dtype(gate_up), gate_up.shape[-1] // 2
    count = math.prod(gate_up.shape[:-1])  # -1 would be ambiguous for I = 0
    if count * inner <= FEW_ELEMENTS:
        gate, up = gate_up.contiguous().to(dtype).chunk(2, -1)
        product = F.silu(gate).mul_(up)
        if weight is not None:
            product *= weight.unsqueeze(-1)
        return product.to(gate_up.dtype)
    out = gate_up.new_empty((*gate_up.shape[:-1], inner))
    rows, out_rows = gate_up.reshape(count, 2 * inner), out.view(count, inner)
    weights = None if weight is None else weight.reshape(-1, 1)
    for part in row_chunks(count, inner):
        gate, up = rows[part].to(dtype).chunk(2, -1)
        product = writable(out_rows[part], dtype)
        torch.ops.aten.silu.out(gate, out=product)
        product *= up
        if weights is not None:
            product *= weights[part]
        if product.dtype != out.dtype:
            out_rows[part] = product
    return out


def swiglu_backward(dy: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu(gate) is computed again; with g = dy weight: dup = g silu(gate), dgate = g up silu'(gate)."""
    dtype, inner = inner_dtype(gate_up), gate_up.shape[-1] // 2
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    count = math.prod(gate_up.shape[:-1])
    rows, drows = (t.reshape(count, 2 * inner) for t in (gate_up, dgate_up))
    grads = dy.reshape(count, inner)
    weights = None if weight is None else weight.reshape(-1)
    dweight = dy.new_empty(0) if weight is None else torch.empty(weight.shape, dtype=dtype, device=dy.device)
    for part in row_chunks(count, inner):
        gate, up = rows[part].to(dtype).chunk(2, -1)
        grad = grads[part].to(dtype)
        result = writable(drows[part], dtype)
        dgate, dup = result.chunk(2, -1)
        product = grad * up
        torch.ops.aten.silu.out(gate, out=dup)
        if weights is not None:
            torch.linalg.vecdot(product, dup, out=dweight.view(-1)[part])
            product *= weights[part, None]
            dup *= weights[part, None]
        torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=dgate)
        dup *= grad
        if result.dtype != drows.dtype:
            drows[part] = result
    return dgate_up, dweight


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Chunks of rows that stay in a core's cache between the passes over them."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def writable(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` themselves if they have the inner dtype, else a scratch tensor like them that does."""
    return rows if rows.dtype == dtype else torch.empty(rows.shape, dtype=dtype, device=rows.device)


def swiglu_quantize(gate_up: Tensor, weight: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_1x128(swiglu(gate_up, weight), pow2, False)


Casts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def casts_by(
    forward: Forward, backward: Backward
) -> tuple[Callable[..., Casts], Callable[..., tuple[Tensor, ...]]]:
    """`swiglu_backward_quantize` and its grouped form, of a `swiglu` and a `swiglu_backward`."""

    def dense(
        dy: Tensor, gate_up: Tensor, gate_up_scale: Tensor | None, weight: Tensor | None, pow2: bool
    ) -> Casts:
        gate_up = values_of(gate_up, gate_up_scale, dy.dtype)
        dgate_up, dweight = backward(dy, gate_up, weight)
        act_t, act_scale_t = quantize_128x1(forward(gate_up, weight), pow2)
        return (*quantize_1x128_128x1(dgate_up, pow2), act_t, act_scale_t, dweight)

    def grouped(
        dy: Tensor,
        gate_up: Tensor,
        gate_up_scale: Tensor | None,
        weight: Tensor | None,
        offsets: Tensor,
        pow2: bool,
    ) -> tuple[Tensor, ...]:
        gate_up = values_of(gate_up, gate_up_scale, dy.dtype)
        dgate_up, dweight = backward(dy, gate_up, weight)
        q, scale, q_t, scale_t, padded = quantize_1x128_128x1_grouped(dgate_up, offsets, pow2)
        act_t, act_scale_t, _ = quantize_128x1_grouped(forward(gate_up, weight), offsets, pow2)
        return q, scale, q_t, scale_t, act_t, act_scale_t, dweight, padded

    return dense, grouped


def values_of(gate_up: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gate_up itself, or what its e4m3 copy stands for."""
    return gate_up if scale is None else dequantize_1x128(gate_up, scale, dtype)


swiglu_backward_quantize, swiglu_backward_quantize_grouped = casts_by(swiglu, swiglu_backward)
