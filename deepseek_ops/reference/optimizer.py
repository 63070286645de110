"""AdamW with low-precision moments, and the gradient norm (report section 3.3.3).

The arithmetic below is the specification that kernels follow bit for bit, which is why it is written with single
IEEE operations (no fused multiply-add, no multiply by a reciprocal) although that costs a few passes. The passes
run on chunks that stay in the L2 cache, so memory is read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .quantize import quantize_128x128, transpose_128x128

# A chunk's operands stay in the L2 cache. No result depends on the value.
CHUNK = 1 << 16
NORM_CHUNK = 1 << 14  # below ATen's threading grain, so a sum has one order whatever the number of threads
_MASK32 = (1 << 32) - 1
_WEYL = 0x9E3779B9  # odd, close to 2^32 / golden ratio: consecutive counters land far apart
_MIX_A, _MIX_B = 0x85EBCA6B, 0xC2B2AE35  # the 32-bit finaliser of MurmurHash3


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    out: list[Tensor],
    weight_decay: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    stochastic_rounding: bool,
    seed: int,
    first_index: int,
) -> None:
    scale: float | Tensor = grad_scale
    if grad_scale_tensor is not None:
        if not math.isfinite(float(grad_scale_tensor)):  # a kernel tests this on the device
            return
        scale = grad_scale_tensor
    step_size = lr / (1.0 - beta1**step)
    denominator_scale = 1.0 / math.sqrt(1.0 - beta2**step)
    index = first_index
    for i, param in enumerate(params):
        operands = [param, grads[i], exp_avg[i], exp_avg_sq[i]] + ([out[i]] if out else [])
        flat = [t.reshape(-1) for t in operands]  # a view where the layout allows it, a copy elsewhere
        for start, stop in _chunks(index, param.numel()):
            p, g, m, v, *rest = (t[start:stop] for t in flat)
            g = (g if g.dtype == torch.float32 else g.float()) * scale
            # The update uses the moments before they are rounded to their storage format.
            m32 = m if m.dtype == torch.float32 else m.float()
            v32 = v if v.dtype == torch.float32 else v.float()
            m32.mul_(beta1).add_(g * (1.0 - beta1))
            v32.mul_(beta2).add_(g.mul_(g).mul_(1.0 - beta2))
            if stochastic_rounding:
                low, high = random_bits(seed, step, index + start, stop - start, param.device)
                _store(m, m32, low)
                _store(v, v32, high)
            else:
                _store(m, m32, None)
                _store(v, v32, None)
            denominator = _sqrt(v32, g).mul_(denominator_scale).add_(eps)
            update = torch.div(m32, denominator, out=denominator).mul_(step_size)
            if weight_decay[i] != 0.0:
                # Added to the update, not multiplied into p: one rounding of p per step, and lr * weight_decay
                # keeps its own precision (1 - 7.3e-7 does not exist in fp32).
                update.add_(p * (lr * weight_decay[i]))
            p.sub_(update)
            if rest:
                rest[0].copy_(p)
        for t, f in zip(operands, flat, strict=True):
            if t is not grads[i] and not t.is_contiguous():
                t.copy_(f.view(t.shape))
        index += param.numel()


def adamw_quantize_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    out: list[Tensor],
    q: list[Tensor],
    scale: list[Tensor],
    q_t: list[Tensor],
    scale_t: list[Tensor],
    weight_decay: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    stochastic_rounding: bool,
    seed: int,
    first_index: int,
    pow2: bool,
) -> None:
    """`adamw_`, then copies of the masters as they are then; an empty vector stands for copies that nobody wants."""
    adamw_(
        params, grads, exp_avg, exp_avg_sq, out, weight_decay, lr, beta1, beta2, eps, step, grad_scale,
        grad_scale_tensor, stochastic_rounding, seed, first_index,
    )  # fmt: skip
    for i, param in enumerate(params):
        if q[i].ndim == 1:
            continue
        copies = quantize_128x128(param, pow2)
        q[i].copy_(copies[0])
        scale[i].copy_(copies[1])
        if q_t[i].ndim != 1:
            turned = transpose_128x128(*copies)
            q_t[i].copy_(turned[0])
            scale_t[i].copy_(turned[1])


def clip_grad_norm(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    device = grads[0].device
    sums = [_sum_of_squares(g) for g in grads if g.numel()]
    # Squares of fp32 are exact in fp64 and cannot overflow there.
    norm = torch.stack(sums).sum().sqrt() if sums else torch.zeros((), dtype=torch.float64, device=device)
    norm = norm.float()
    # Tensors on both sides: `number / tensor` would multiply by a rounded reciprocal.
    scale = torch.where(norm > max_norm, torch.full_like(norm, max_norm) / norm, torch.ones_like(norm))
    return norm, torch.where(torch.isfinite(norm), scale, torch.full_like(norm, math.nan))


def random_bits(seed: int, step: int, index: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two int32 tensors of 16 random bits for the elements ``index .. index + count`` of the optimizer state.

    A pure function of (seed, step, element): ``mix(element_low * WEYL + key)`` in 32-bit arithmetic, where `key`
    holds seed, step and the high half of the element. A range must not cross a multiple of 2^32.
    """
    key = mix_key(seed, step, index >> 32)
    h = torch.arange(count, dtype=torch.int32, device=device)
    h.mul_(_signed(_WEYL)).add_(_signed((index & _MASK32) * _WEYL + key))
    h ^= (h >> 16) & 0xFFFF  # torch shifts arithmetically
    h *= _signed(_MIX_A)
    h ^= (h >> 13) & 0x7FFFF
    h *= _signed(_MIX_B)
    h ^= (h >> 16) & 0xFFFF
    return h & 0xFFFF, (h >> 16) & 0xFFFF


def mix_key(seed: int, step: int, index_high: int) -> int:
    """The 32-bit key of a (seed, step, high half of the element index)."""
    key = 0
    for word in (seed, seed >> 32, step, step >> 32, index_high):
        key = (key ^ (word & _MASK32)) * _WEYL & _MASK32
        key ^= key >> 16
        key = key * _MIX_A & _MASK32
        key ^= key >> 13
        key = key * _MIX_B & _MASK32
        key ^= key >> 16
    return key


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16: the upper neighbour with probability equal to the distance from the lower one.

    `noise` is int32 in [0, 2^16). It is added below the bits that bf16 keeps and the carry does the rest, in
    magnitude, so both signs are unbiased. Exact values, infinities and NaN stay what they are.
    """
    bits = x.view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    if not math.isfinite(float(x.sum())):  # the usual chunk skips the slow selection
        rounded = torch.where(torch.isfinite(x), rounded, x)
    return rounded.to(torch.bfloat16)


def _sqrt(x: Tensor, out: Tensor) -> Tensor:
    """The correctly rounded fp32 square root, into `out`.

    torch.sqrt on a CPU is one ulp off for a fifth of all values (it calls MKL's vector library, measured on an
    AVX-512 machine); numpy uses the instruction. On CUDA both are the IEEE result.
    """
    if x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=out.numpy())
    return out


def _store(target: Tensor, value: Tensor, noise: Tensor | None) -> None:
    if target.dtype == torch.float32:
        return  # computed in place
    target.copy_(value if noise is None else stochastic_round(value, noise))


def _chunks(index: int, count: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most CHUNK elements; `index + start` and `index + stop - 1` share their high 32 bits."""
    start = 0
    while start < count:
        stop = min(count, start + CHUNK, (((index + start) >> 32) + 1 << 32) - index)
        yield start, stop
        start = stop


def _sum_of_squares(grad: Tensor) -> Tensor:
    flat = grad.reshape(-1)
    whole = flat.numel() // NORM_CHUNK
    parts = [
        part.double().square().sum() for part in flat[: whole * NORM_CHUNK].view(whole, NORM_CHUNK).unbind()
    ]
    tail = flat[whole * NORM_CHUNK :]
    if tail.numel():
        parts.append(tail.double().square().sum())
    total = parts[0]
    for i in range(1, len(parts), NORM_CHUNK):
        total = total + torch.stack(parts[i : i + NORM_CHUNK]).sum()
    return total


def _signed(word: int) -> int:
    """The int32 with the low 32 bits of `word`."""
    word &= _MASK32
    return word - (1 << 32) if word >= 1 << 31 else word
