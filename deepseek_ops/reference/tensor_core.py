"""The Hopper tensor core as it accumulates, bit by bit (report 3.3.2, "increasing accumulation precision").

One wgmma step multiplies exactly but does not add in fp32. Every product, and the accumulator as one term more,
is aligned to the largest exponent among them and cut (toward zero) to a fixed number of fractional bits; the cut
terms are added exactly; the sum is cut to the width of the accumulator's mantissa:

    operands   k of a step   fractional bits kept   mantissa bits of the result
    e4m3       32            13                     13
    bf16       16            25                     23

An exponent here is that of the operands' significands, not of the normalised product: a product of two
significands in [1, 2) has exponent ea + eb whether it lies in [1, 2) or in [2, 4). Subnormal operands keep the
smallest exponent of their format. Zero terms have no exponent and never decide the alignment. A sum of zero is
+0; a NaN, or infinities of both signs, give the canonical NaN 0x7FFFFFFF; a result beyond fp32 gives infinity.

Cutting toward zero is why an un-promoted FP8 GEMM shrinks its result more with every step, and why the report
moves the accumulator to fp32 registers every 128 elements (`matmul_promoted`).

The model follows published measurements (arXiv 2511.10909, 2512.07004); the golden vectors of `bench/prove.py`
settle it. `tests/oracle_tensor_core.py` states the same rules in Python integers.

Everything is computed in float64, and every float64 operation below is exact: a product has at most 16
significant bits (40 with a scale), aligned terms are integers below 2^28, and 33 of them stay below 2^34.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._checks import E4M3, ceil_div

SLICE = 128
"""Elements of K between two promotions: one scale tile, four e4m3 steps."""

_NOTHING = -4000  # the exponent of zero: below every real one, and two of them still fit int16
_LOWEST = -600  # below every real sum of exponents; 2^600 is still an ordinary float64
_FP32_MIN_EXPONENT = -126
_CHUNK = 1 << 17  # products held at once: 1 MiB of float64 stays in the cache
_PARTIALS = 1 << 22  # partial sums held at once


@dataclass(frozen=True)
class Format:
    """How wgmma treats one operand format: k of a step, bits kept in alignment and in the result."""

    k: int
    min_exponent: int
    fraction_bits: int
    mantissa_bits: int


FORMATS = {
    E4M3: Format(k=32, min_exponent=-6, fraction_bits=13, mantissa_bits=13),
    torch.bfloat16: Format(k=16, min_exponent=-126, fraction_bits=25, mantissa_bits=23),
}


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float64 for int64 exponents of normal numbers, made from the bits and therefore exact."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _exponent(x: torch.Tensor, min_exponent: int) -> torch.Tensor:
    """floor(log2 |x|) of a float64 tensor, not below `min_exponent`; `_NOTHING` for zero."""
    exponent = torch.frexp(x)[1].to(torch.int64).sub_(1).clamp_(min_exponent, 1023)
    return exponent.masked_fill_(x == 0, _NOTHING)


def _step(
    form: Format,
    a: torch.Tensor,
    exponent_a: torch.Tensor,
    b: torch.Tensor,
    exponent_b: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """One step on operands [k, B, M] and [k, B, N] in float64; c and scale [B, M, N] in float64.

    Infinities and NaN need no code: float64 carries them through, whatever exponent `frexp` gives them.
    """
    products = a.unsqueeze(-1) * b.unsqueeze(-2)
    largest = (exponent_a.unsqueeze(-1) + exponent_b.unsqueeze(-2)).amax(0).to(torch.int64)
    if scale is not None:
        largest += _exponent(scale, -1022)
    exponent = torch.maximum(largest, _exponent(c, _FP32_MIN_EXPONENT)).clamp_(_LOWEST, 700)
    align = _power_of_two(form.fraction_bits - exponent)
    terms = products.mul_(align if scale is None else align * scale).trunc_()
    total = terms.sum(0) + (c * align).trunc_()
    result = total * _power_of_two(exponent - form.fraction_bits)
    width = _exponent(result, _FP32_MIN_EXPONENT).clamp_(min=_FP32_MIN_EXPONENT)
    result = (result * _power_of_two(form.mantissa_bits - width)).trunc_()
    result = result * _power_of_two(width - form.mantissa_bits) + 0.0  # + 0.0 turns -0 into +0
    return result.to(torch.float32).to(torch.float64)  # exact, or infinity beyond the range


def _decode(x: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., M, K] -> values (float64) and exponents (int16), both [K, batch, M]: reductions over k run fast."""
    values = x.reshape(batch, *x.shape[-2:]).to(torch.float64).movedim(-1, 0).contiguous()
    return values, _exponent(values, FORMATS[x.dtype].min_exponent).to(torch.int16)


def tensor_core_accumulate(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Chain wgmma steps over all of K: ``c + a @ b^T`` as one tensor-core accumulator computes it.

    a: [..., M, K] e4m3 or bf16; b: [..., N, K] of the same dtype and leading shape; c: fp32 [..., M, N], zero
    when absent (the first step clears). Steps take K in ascending order; a short last step is zero filled.
    scale: fp32 [..., M, N], multiplies every product exactly before alignment, its exponent floor(log2 scale)
    added to the product's. No instruction does this: it lets `matmul_unpromoted` ask what one would give.
    Returns fp32 [..., M, N].
    """
    form, batch = FORMATS[a.dtype], a.shape[:-2].numel()
    m, n, k = a.shape[-2], b.shape[-2], a.shape[-1]
    out = a.new_zeros((*a.shape[:-2], m, n), dtype=torch.float32)
    if out.numel() == 0:
        return out
    if c is not None:
        out.copy_(c)
    (a64, exponent_a), (b64, exponent_b) = _decode(a, batch), _decode(b, batch)
    flat_out = out.view(batch, m, n)
    flat_scale = None if scale is None else scale.reshape(batch, m, n)
    rows = max(1, _CHUNK // (n * form.k))
    matrices = max(1, rows // m)
    for i in range(0, batch, matrices):
        for j in range(0, m, rows):
            some, part = slice(i, i + matrices), slice(j, j + rows)
            acc = flat_out[some, part].to(torch.float64)
            s = None if flat_scale is None else flat_scale[some, part].to(torch.float64)
            for start in range(0, k, form.k):
                step = slice(start, start + form.k)
                of_a = a64[step, some, part], exponent_a[step, some, part]
                acc = _step(form, *of_a, b64[step, some], exponent_b[step, some], acc, s)
            flat_out[some, part] = acc.to(torch.float32)
    canonical = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=out.device).view(torch.float32)
    return torch.where(out.isnan(), canonical, out)


def tensor_core_step(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """One wgmma step: ``c + a @ b^T`` with K no longer than 32 (e4m3) or 16 (bf16).

    Shapes and dtypes of `tensor_core_accumulate`; returns fp32 [..., M, N]. ValueError if K is longer.
    """
    if a.shape[-1] > FORMATS[a.dtype].k:
        raise ValueError(f"a: one step takes at most {FORMATS[a.dtype].k} columns; got {a.shape[-1]}")
    return tensor_core_accumulate(a, b, c, scale)


def fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """``x * y + z`` on fp32 tensors with a single rounding, as the FFMA instruction.

    The product is exact in float64 (48 bits), the sum is not, and rounding it to float64 and then to fp32 would
    round twice. So the float64 sum is rounded to odd: where it is inexact and its last bit is 0, it moves one
    step toward the exact value. What was no tie stays no tie, and the final rounding is the only one.
    """
    product = x.to(torch.float64) * y.to(torch.float64)
    addend = z.to(torch.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # TwoSum: total + error is the exact sum
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)  # magnitude grows when both have one sign
    inexact = total.isfinite() & (error != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + away, bits).view(torch.float64).to(torch.float32)


def _slices(x: torch.Tensor) -> torch.Tensor:
    """[..., M, K] -> [S, ..., M, 128], the tail of K filled with zeros."""
    k = x.shape[-1]
    count = ceil_div(k, SLICE)
    if k % SLICE:
        padded = x.new_zeros((*x.shape[:-1], count * SLICE))
        padded[..., :k] = x
        x = padded
    return x.unflatten(-1, (count, SLICE)).movedim(-2, 0)


def _slice_scales(scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    """[..., S, M] and [..., S, N] -> [S, ..., M, N], one fp32 rounding per product."""
    return scale_a.movedim(-2, 0).unsqueeze(-1) * scale_b.movedim(-2, 0).unsqueeze(-2)


def matmul_promoted(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    """The FP8 GEMM of report 3.3.2: per 128 of K, ``acc = fma(p, s, acc)`` in fp32, K ascending.

    a: e4m3 [..., M, K], b: e4m3 [..., N, K], scale_a: fp32 [..., ceil(K/128), M], scale_b: [..., ceil(K/128), N].
    p is the tensor core's result for the slice from a cleared accumulator; s = fl32(scale_a * scale_b).
    Returns fp32 [..., M, N].
    """
    a_slices, b_slices = _slices(a), _slices(b)
    acc = scale_a.new_zeros((*a.shape[:-1], b.shape[-2]))
    slab = max(1, _PARTIALS // max(1, acc.numel()))
    for start in range(0, a_slices.shape[0], slab):
        now = slice(start, start + slab)
        partial = tensor_core_accumulate(a_slices[now], b_slices[now])
        scale = _slice_scales(scale_a[..., now, :], scale_b[..., now, :])
        for p, s in zip(partial, scale, strict=True):
            acc = fma(p, s, acc)
    return acc


def matmul_unpromoted(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    """What report 3.3.2 warns of: one tensor-core accumulator over all of K, never cleared.

    Arguments and result of `matmul_promoted`. With unit scales this is the hardware's own behaviour. The hardware
    has no place for scales that change along K; here every product carries s = fl32(scale_a * scale_b) exactly
    into the alignment, so that real quantised data can be compared in one call. It is an experiment, no kernel.
    """
    acc = scale_a.new_zeros((*a.shape[:-1], b.shape[-2]))
    for i, (a_slice, b_slice) in enumerate(zip(_slices(a), _slices(b), strict=True)):
        now = slice(i, i + 1)
        scale = _slice_scales(scale_a[..., now, :], scale_b[..., now, :])[0]
        acc = tensor_core_accumulate(a_slice, b_slice, acc, scale)
    return acc
