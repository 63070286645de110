"""Quantisation to FP8 (e4m3) and to the 12-bit E5M6, and back (report sections 3.3.2, 3.5.2; NUMERICS.md).

Common to every function here:

- ``x`` is bf16 or fp32, contiguous or not; ``q`` is float8_e4m3fn. A scale is fp32 and always the *dequantisation*
  multiplier: ``x ~ q * scale``. Nothing is differentiable.
- ``scale = amax / 448`` and ``q = e4m3(x * (448 / amax))``, each operation rounded once in fp32, the last one to
  nearest-even and saturating. With ``pow2`` the scale is the smallest power of two not below ``amax / 448`` (nor
  below 2^-126) and the multiplier its exact inverse.
- A tile of zeros: scale 1, zeros with their sign. A tile with amax below 2^-118 is scaled as if it were 2^-118.
- A tile with Inf or NaN: scale 1; those elements become NaN (0x7F with their sign), the others are quantised with
  scale 1 (values past 448 saturate). No other tile changes.
- GEMM-ready scales of a ``[M, K]`` tensor in 1 x 128 tiles: fp32 ``[ceil(K/128), round_up(M, 4)]``, M contiguous,
  padding 1. A last tile may be short; its amax is over what exists.
- ``offsets`` is int32 ``[G+1]`` on the device of ``x``, non-decreasing: rows ``offsets[g]`` up to ``offsets[g+1]``
  are group g. Its values are never read by the host and therefore not checked.

fp32 subnormals count: do not run these functions under ``torch.set_flush_denormal(True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import E4M3, ceil_div, check_choice, check_tensor, require, round_up
from ._registry import declare
from .reference import e5m6 as reference_e5m6
from .reference import quantize as reference
from .reference.quantize import padded_tokens

__all__ = [
    "dequantize_1x128",
    "dequantize_128x1",
    "dequantize_128x128",
    "pack_e5m6",
    "padded_tokens",
    "quantize_1x128",
    "quantize_1x128_128x1",
    "quantize_128x1",
    "quantize_128x128",
    "requantize_128x1",
    "requantize_e5m6_128x1",
    "transpose_128x128",
    "unpack_e5m6",
]

TILE = reference.TILE
_INPUT = (torch.bfloat16, torch.float32)
_OUTPUT = (torch.float32, torch.bfloat16, torch.float64)


def quantize_1x128(x: Tensor, *, pow2: bool = False, official_clamp: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise ``x [M, K]`` in tiles of one row and 128 columns (activations and gradients).

    Returns q [M, K] and its GEMM-ready scale. ``official_clamp`` raises amax to at least 1e-4, zero tiles
    included, as the released inference code does; it erases small gradients.
    Raises `ArgumentError` for a wrong dtype or number of dimensions.
    """
    check_tensor("x", x, dtype=_INPUT, ndim=2)
    return _quantize_1x128(x, pow2, official_clamp)


def quantize_128x1(x: Tensor, *, pow2: bool = False, offsets: Tensor | None = None) -> tuple[Tensor, ...]:
    """Quantise ``x [T, C]`` in tiles of 128 tokens and one channel, stored transposed (the operands of Wgrad).

    Returns q_t [C, Tp] and scale [Tp / 128, round_up(C, 4)], GEMM-ready for q_t. Padding is q = 0, scale 1.
    Without ``offsets`` Tp = round_up(T, 128), a short last tile taking its amax over what exists.
    With ``offsets`` each group is padded to a multiple of 128 on its own, Tp = `padded_tokens` (T, G), and
    padded_offsets int32 [G+1] is returned as third: group g lies in columns padded_offsets[g] up to
    padded_offsets[g+1], its tokens first. Columns past padded_offsets[G] are padding; tokens of no group are dropped.
    """
    check_tensor("x", x, dtype=_INPUT, ndim=2)
    if offsets is None:
        return _quantize_128x1(x, pow2)
    _check_offsets(offsets, x.device)
    return _quantize_128x1_grouped(x, offsets, pow2)


def quantize_1x128_128x1(
    x: Tensor, *, pow2: bool = False, offsets: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`quantize_1x128` and `quantize_128x1` of ``x [T, C]`` from one read.

    Returns (q, scale, q_t, scale_t), and padded_offsets as fifth when ``offsets`` is given.
    """
    check_tensor("x", x, dtype=_INPUT, ndim=2)
    if offsets is None:
        return _quantize_1x128_128x1(x, pow2)
    _check_offsets(offsets, x.device)
    return _quantize_1x128_128x1_grouped(x, offsets, pow2)


def quantize_128x128(w: Tensor, *, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise weights ``w [N, K]`` or ``[G, N, K]`` in blocks of 128 x 128; edge blocks may be short.

    Returns q of the shape of w and scale [ceil(N/128), ceil(K/128)], with the leading G of w.
    """
    check_tensor("w", w, dtype=_INPUT, ndim=(2, 3))
    return _quantize_128x128(w, pow2)


def transpose_128x128(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The exact transposed copy of block-quantised weights, for Dgrad: q [.., N, K] -> q_t [.., K, N]."""
    _check_blocks(q, scale)
    return _transpose_128x128(q, scale)


def requantize_128x1(q: Tensor, scale: Tensor, *, offsets: Tensor | None = None) -> tuple[Tensor, ...]:
    """Turn 1 x 128 tiles ``q [T, C]`` into 128 x 1 tiles stored transposed, with power-of-two scales (section 3.5.2).

    Equals ``quantize_128x1(dequantize_1x128(q, scale), pow2=True, offsets=offsets)`` and returns the same things.
    On power-of-two scales this shifts exponents: only values that underflow the new tile's range are rounded.
    Other scales are allowed; their products are rounded to fp32 first.
    """
    _check_rows(q, scale)
    if offsets is None:
        return _requantize_128x1(q, scale)
    _check_offsets(offsets, q.device)
    return _requantize_128x1_grouped(q, scale, offsets)


def requantize_e5m6_128x1(
    packed: Tensor, scale: Tensor, hidden: int, *, offsets: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Turn an activation cached in E5M6 tiles into e4m3 128 x 1 tiles stored transposed (section 3.5.2).

    packed, scale: of `pack_e5m6` with granularity "tile" of ``x [T, hidden]``, here the input of the Linear after
    attention, which its Wgrad needs. Equals ``quantize_128x1(unpack_e5m6(packed, scale, hidden, dtype=float32),
    pow2=True, offsets=offsets)`` without the values ever being written, and returns the same things.
    """
    _check_packed(packed, scale, hidden, "tile")
    if offsets is None:
        return _requantize_e5m6_128x1(packed, scale, hidden)
    _check_offsets(offsets, packed.device)
    return _requantize_e5m6_128x1_grouped(packed, scale, hidden, offsets)


def pack_e5m6(x: Tensor, *, granularity: str = "tile") -> tuple[Tensor, Tensor]:
    """Quantise ``x [T, H]`` to E5M6: sign, 5 exponent bits (bias 15), 6 mantissa bits; 1.5 bytes per value.

    granularity: "tile", power-of-two scales per 1 x 128 tile in the GEMM-ready layout (the report);
    "row", one scale amax / 65024 per row, fp32 [T].
    Returns packed uint8 [T, ceil(H/8) * 12] and the scale. Eight values fill three 32-bit words from the most
    significant bit down; the words are stored little-endian. Values past H in the last group are zero.
    Rounding is to nearest-even from the fp32 value ``x * multiplier``, subnormals included, saturating at 65024.
    Special tiles follow the module's rules, with 2^-111 for 2^-118 and 0x7FF (with sign) for NaN.
    """
    check_tensor("x", x, dtype=_INPUT, ndim=2)
    check_choice("granularity", granularity, ("tile", "row"))
    return _pack_e5m6(x, granularity)


def unpack_e5m6(
    packed: Tensor,
    scale: Tensor,
    hidden: int,
    *,
    granularity: str = "tile",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The values of `pack_e5m6` with ``hidden`` = H: value * scale in fp32, then one rounding to ``dtype``. [T, H]"""
    check_choice("granularity", granularity, ("tile", "row"))
    check_choice("dtype", dtype, (torch.bfloat16, torch.float32))
    _check_packed(packed, scale, hidden, granularity)
    return _unpack_e5m6(packed, scale, hidden, granularity, dtype)


def dequantize_1x128(q: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale of `quantize_1x128`, [M, K].

    dtype: float32 (one rounding), bfloat16 (the fp32 product rounded again) or float64 (exact).
    """
    _check_rows(q, scale)
    check_choice("dtype", dtype, _OUTPUT)
    return _dequantize_1x128(q, scale, dtype)


def dequantize_128x1(
    q_t: Tensor, scale: Tensor, tokens: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q_t * scale of `quantize_128x1`, turned back to [tokens, C]; dtype as in `dequantize_1x128`.

    ``tokens`` at most Tp. Groups keep their padding: row t is column t of q_t.
    """
    check_tensor("q_t", q_t, dtype=E4M3, ndim=2)
    channels, padded = q_t.shape
    require(padded % TILE == 0, "q_t", f"must have a multiple of {TILE} columns", f"shape {tuple(q_t.shape)}")
    check_tensor(
        "scale", scale, dtype=torch.float32, shape=_row_scale_shape(channels, padded), device=q_t.device
    )
    require(0 <= tokens <= padded, "tokens", f"must be in [0, {padded}], the columns of q_t", tokens)
    check_choice("dtype", dtype, _OUTPUT)
    return _dequantize_128x1(q_t, scale, tokens, dtype)


def dequantize_128x128(q: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale of `quantize_128x128`, of the shape of q; dtype as in `dequantize_1x128`."""
    _check_blocks(q, scale)
    check_choice("dtype", dtype, _OUTPUT)
    return _dequantize_128x128(q, scale, dtype)


# Checks and shapes


def _row_scale_shape(rows: int, length: int) -> list[int]:
    return [ceil_div(length, TILE), round_up(rows, 4)]


def _block_scale_shape(shape: torch.Size) -> list[int]:
    return [*shape[:-2], ceil_div(shape[-2], TILE), ceil_div(shape[-1], TILE)]


def _check_offsets(offsets: Tensor, device: torch.device) -> None:
    check_tensor("offsets", offsets, dtype=torch.int32, ndim=1, device=device)
    require(offsets.shape[0] >= 1, "offsets", "must have one element more than groups", tuple(offsets.shape))


def _check_rows(q: Tensor, scale: Tensor) -> None:
    check_tensor("q", q, dtype=E4M3, ndim=2)
    check_tensor("scale", scale, dtype=torch.float32, shape=_row_scale_shape(*q.shape), device=q.device)


def _check_packed(packed: Tensor, scale: Tensor, hidden: int, granularity: str) -> None:
    check_tensor("packed", packed, dtype=torch.uint8, ndim=2)
    require(hidden >= 0, "hidden", "must not be negative", hidden)
    tokens = packed.shape[0]
    rule = f"must have ceil(hidden / 8) * 12 columns, {ceil_div(hidden, 8) * 12} for hidden {hidden}"
    require(packed.shape[1] == ceil_div(hidden, 8) * 12, "packed", rule, f"shape {tuple(packed.shape)}")
    shape = [tokens] if granularity == "row" else _row_scale_shape(tokens, hidden)
    check_tensor("scale", scale, dtype=torch.float32, shape=shape, device=packed.device)


def _check_blocks(q: Tensor, scale: Tensor) -> None:
    check_tensor("q", q, dtype=E4M3, ndim=(2, 3))
    check_tensor("scale", scale, dtype=torch.float32, shape=_block_scale_shape(q.shape), device=q.device)


# Declarations


def _fake_rows(x: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    scale = x.new_empty(_row_scale_shape(rows, length), dtype=torch.float32)
    return x.new_empty((rows, length), dtype=E4M3), scale


def _fake_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens, channels = x.shape
    return _fake_rows(x, channels, round_up(tokens, TILE))


def _fake_grouped_columns(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, channels = x.shape
    padded = padded_tokens(tokens, offsets.shape[0] - 1)
    return (*_fake_rows(x, channels, padded), offsets.new_empty(offsets.shape))


def _fake_pack(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    shape = [tokens] if granularity == "row" else _row_scale_shape(tokens, hidden)
    packed = x.new_empty((tokens, ceil_div(hidden, 8) * 12), dtype=torch.uint8)
    return packed, x.new_empty(shape, dtype=torch.float32)


_quantize_1x128 = declare(
    "quantize_1x128(Tensor x, bool pow2, bool official_clamp) -> (Tensor q, Tensor scale)",
    reference=reference.quantize_1x128,
    fake=lambda x, pow2, official_clamp: _fake_rows(x, *x.shape),
)
_quantize_128x1 = declare(
    "quantize_128x1(Tensor x, bool pow2) -> (Tensor q_t, Tensor scale)",
    reference=reference.quantize_128x1,
    fake=lambda x, pow2: _fake_columns(x),
)
_quantize_128x1_grouped = declare(
    "quantize_128x1_grouped(Tensor x, Tensor offsets, bool pow2)"
    " -> (Tensor q_t, Tensor scale, Tensor padded_offsets)",
    reference=reference.quantize_128x1_grouped,
    fake=lambda x, offsets, pow2: _fake_grouped_columns(x, offsets),
)
_quantize_1x128_128x1 = declare(
    "quantize_1x128_128x1(Tensor x, bool pow2) -> (Tensor q, Tensor scale, Tensor q_t, Tensor scale_t)",
    reference=reference.quantize_1x128_128x1,
    fake=lambda x, pow2: (*_fake_rows(x, *x.shape), *_fake_columns(x)),
)
_quantize_1x128_128x1_grouped = declare(
    "quantize_1x128_128x1_grouped(Tensor x, Tensor offsets, bool pow2)"
    " -> (Tensor q, Tensor scale, Tensor q_t, Tensor scale_t, Tensor padded_offsets)",
    reference=reference.quantize_1x128_128x1_grouped,
    fake=lambda x, offsets, pow2: (*_fake_rows(x, *x.shape), *_fake_grouped_columns(x, offsets)),
)
_quantize_128x128 = declare(
    "quantize_128x128(Tensor w, bool pow2) -> (Tensor q, Tensor scale)",
    reference=reference.quantize_128x128,
    fake=lambda w, pow2: (
        w.new_empty(w.shape, dtype=E4M3),
        w.new_empty(_block_scale_shape(w.shape), dtype=torch.float32),
    ),
)
_transpose_128x128 = declare(
    "transpose_128x128(Tensor q, Tensor scale) -> (Tensor q_t, Tensor scale_t)",
    reference=reference.transpose_128x128,
    fake=lambda q, scale: (q.new_empty(q.mT.shape), scale.new_empty(scale.mT.shape)),
)
_requantize_128x1 = declare(
    "requantize_128x1(Tensor q, Tensor scale) -> (Tensor q_t, Tensor scale_t)",
    reference=reference.requantize_128x1,
    fake=lambda q, scale: _fake_columns(q),
)
_requantize_128x1_grouped = declare(
    "requantize_128x1_grouped(Tensor q, Tensor scale, Tensor offsets)"
    " -> (Tensor q_t, Tensor scale_t, Tensor padded_offsets)",
    reference=reference.requantize_128x1_grouped,
    fake=lambda q, scale, offsets: _fake_grouped_columns(q, offsets),
)
_requantize_e5m6_128x1 = declare(
    "requantize_e5m6_128x1(Tensor packed, Tensor scale, SymInt hidden) -> (Tensor q_t, Tensor scale_t)",
    reference=reference_e5m6.requantize_e5m6_128x1,
    fake=lambda packed, scale, hidden: _fake_columns(packed.new_empty((packed.shape[0], hidden))),
)
_requantize_e5m6_128x1_grouped = declare(
    "requantize_e5m6_128x1_grouped(Tensor packed, Tensor scale, SymInt hidden, Tensor offsets)"
    " -> (Tensor q_t, Tensor scale_t, Tensor padded_offsets)",
    reference=reference_e5m6.requantize_e5m6_128x1_grouped,
    fake=lambda packed, scale, hidden, offsets: _fake_grouped_columns(
        packed.new_empty((packed.shape[0], hidden)), offsets
    ),
)
_pack_e5m6 = declare(
    "pack_e5m6(Tensor x, str granularity) -> (Tensor packed, Tensor scale)",
    reference=reference_e5m6.pack_e5m6,
    fake=_fake_pack,
)
_unpack_e5m6 = declare(
    "unpack_e5m6(Tensor packed, Tensor scale, SymInt hidden, str granularity, ScalarType dtype) -> Tensor",
    reference=reference_e5m6.unpack_e5m6,
    fake=lambda packed, scale, hidden, granularity, dtype: packed.new_empty(
        (packed.shape[0], hidden), dtype=dtype
    ),
)
_dequantize_1x128 = declare(
    "dequantize_1x128(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_1x128,
    fake=lambda q, scale, dtype: q.new_empty(q.shape, dtype=dtype),
)
_dequantize_128x1 = declare(
    "dequantize_128x1(Tensor q_t, Tensor scale, SymInt tokens, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_128x1,
    fake=lambda q_t, scale, tokens, dtype: q_t.new_empty((tokens, q_t.shape[0]), dtype=dtype),
)
_dequantize_128x128 = declare(
    "dequantize_128x128(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_128x128,
    fake=lambda q, scale, dtype: q.new_empty(q.shape, dtype=dtype),
)
