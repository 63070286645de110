"""Matrix products of training and inference: FP8 with fine-grained scales, and bf16 / fp32 / fp64 (report 3.3).

Everything is D = A B^T on row-major operands, and wgrad is the product over tokens that a weight gradient needs.

| operands | one matrix | groups of rows | padded batch | gradient of weights |
|---|---|---|---|---|
| e4m3 with fp32 scales | `fp8_gemm` | `fp8_gemm_grouped` | `fp8_gemm_masked` | `fp8_wgrad`, `fp8_wgrad_grouped` |
| the same, at most 64 rows | `fp8_gemm_decode` | | `fp8_gemm_masked_decode` | |
| bf16, fp32 or fp64 | `gemm` | `gemm_grouped` | `gemm_masked` | `wgrad`, `wgrad_grouped` |

Words used below, once for all:

- *row scales* of an e4m3 operand [M, K]: one per row and 128 columns, stored as fp32 [ceil(K/128), M padded to 4].
  *Block scales* of a weight [N, K]: one per 128 x 128 block, fp32 [ceil(N/128), ceil(K/128)]. The value of an
  element is q * scale. `deepseek_ops.quantize` writes both layouts.
- `offsets`: int32 [G+1] on the operands' device. Rows offsets[g] .. offsets[g+1] belong to group g. No alignment;
  empty groups are fine. They must ascend and stay within the rows; only the reference backend can tell and
  raises `ArgumentError`. Kernels of e4m3 operands clamp them to the rows and take an offset below an earlier one for
  that one, so that nothing outside of `out` is ever written; they serve up to 512 groups.
- `masked_m`: int32 [G] on the device: matrix g of the batch has that many rows, the rest is padding whose content
  never matters.
- `out`: write there and return it; any strides; no gradient. Rows that no group owns stay untouched in `out` and
  are zero in a fresh result. `out_dtype` defaults to out's, else to the function's default; bf16 or fp32.
- A bf16 result is rounded once, to nearest even. For e4m3 operands it is the fp32 result rounded, bit for bit; for
  bf16 operands the two may differ in the order of their sums. `accumulate=True` adds to `out`: the old value and
  the new one are summed in fp32 and rounded once to out's dtype.
- `accumulation`, for e4m3 operands:
  "exact" (default) asks for the accuracy of promoted accumulation, relative RMS error <= 3e-4 against the exact
  product of the dequantised operands for any K (docs/numerics.md), and leaves the order to the backend. The
  reference dequantises (one fp32 rounding per element) and makes one fp32 product, so fp32 rounding is its only
  error, near 1e-7 (torch's own matmul precision setting applies).
  "hopper" asks for the tensor core's own bits: per 128 of K, ascending, acc = fma(p, fl32(scale_a * scale_b), acc)
  with p the tensor core's partial sum; a tail of K is zero filled.
  "hopper_unpromoted" is the experiment of report 3.3.2: one accumulator over all of K. With unit scales it is
  what the hardware does; other scales multiply each product exactly, since the hardware has no place for them.

Kernels compute the bits of "hopper" for "exact" too, and refuse "hopper_unpromoted". They want the elements of a row
side by side and operands that start at multiples of 16 bytes; the reference takes any strides.

For bf16 operands kernels compute the bits of one tensor-core accumulator over all of K (docs/numerics.md), and read
operands of any strides: those with one contiguous dimension and the rest at multiples of 16 bytes where they lie, others
from a copy. They want the elements of a row of `out` side by side, and refuse fp32 and fp64 operands. Two knobs never
change a bit of the result, and the reference ignores them: `num_sms`, multiprocessors that the kernel may use, so that
communication can run beside it (0: all), and `tile`, rows and columns of D that one block computes at a time, one of
`_gemm_checks.BF16_GEMM_TILES` (None: a cost model chooses).

Any dimension may be zero. Results repeat bit by bit. Every `ArgumentError` is raised before work starts.
"""

from __future__ import annotations

import torch

from . import _gemm_checks as check
from . import _gemm_decode_ops as decode_ops
from . import _gemm_ops as ops

__all__ = [
    "fp8_gemm",
    "fp8_gemm_decode",
    "fp8_gemm_grouped",
    "fp8_gemm_masked",
    "fp8_gemm_masked_decode",
    "fp8_wgrad",
    "fp8_wgrad_grouped",
    "gemm",
    "gemm_grouped",
    "gemm_masked",
    "wgrad",
    "wgrad_grouped",
]


def fp8_gemm(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    accumulation: str = "exact",
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """D = A B^T of an activation (1x128 scales) and a weight (128x128 scales): Fprop and Dgrad.

    a: e4m3 [M, K] with row scales; b: e4m3 [N, K] with block scales. Returns [M, N], bf16 unless asked otherwise.

    Two knobs of the kernel, which never change a bit of the result and which the reference ignores:
    num_sms: multiprocessors that it may use, so that communication can run beside it; 0: all.
    tile: rows and columns of D that one block computes at a time, one of `_gemm_checks.FP8_GEMM_TILES`; None lets
    a cost model choose.
    """
    check.check_fp8("a", a, 2)
    check.check_row_scale("scale_a", scale_a, a)
    check.check_fp8("b", b, 2, a.device)
    check.check_same_size("b", b, 1, a.shape[1], "a has columns")
    check.check_block_scale("scale_b", scale_b, b)
    check.check_accumulation(accumulation)
    check.check_num_sms(num_sms)
    knobs = (num_sms, *check.check_tile(tile))
    shape = (a.shape[0], b.shape[0])
    dtype = check.check_output(out, out_dtype, torch.bfloat16, shape, a, accumulate)
    if out is None:
        return ops.fp8_gemm(a, scale_a, b, scale_b, dtype, accumulation, *knobs)
    ops.fp8_gemm_(a, scale_a, b, scale_b, out, accumulate, accumulation, *knobs)
    return out


def fp8_gemm_grouped(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulation: str = "exact",
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`fp8_gemm` of every expert on its own rows: D[rows of g] = A[rows of g] B[g]^T.

    a: e4m3 [M, K] with row scales; b: e4m3 [G, N, K] with block scales [G, ...]; offsets: int32 [G+1].
    Returns [M, N], bf16 unless asked otherwise; rows outside the offsets are zero, or untouched in `out`.
    num_sms, tile: as in `fp8_gemm`; one of `_gemm_checks.FP8_GROUPED_TILES`. The cost model knows M / G rows per group.
    """
    check.check_fp8("a", a, 2)
    check.check_row_scale("scale_a", scale_a, a)
    check.check_fp8("b", b, 3, a.device)
    check.check_same_size("b", b, 2, a.shape[1], "a has columns")
    check.check_block_scale("scale_b", scale_b, b)
    check.check_index("offsets", offsets, b.shape[0] + 1, a.device)
    check.check_accumulation(accumulation)
    check.check_num_sms(num_sms)
    knobs = (num_sms, *check.check_tile(tile, check.FP8_GROUPED_TILES))
    dtype = check.check_output(out, out_dtype, torch.bfloat16, (a.shape[0], b.shape[1]), a)
    if out is None:
        return ops.fp8_gemm_grouped(a, scale_a, b, scale_b, offsets, dtype, accumulation, *knobs)
    ops.fp8_gemm_grouped_(a, scale_a, b, scale_b, offsets, out, accumulation, *knobs)
    return out


def fp8_gemm_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulation: str = "exact",
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`fp8_gemm` over a batch in which matrix g has masked_m[g] rows: decoding with fixed buffers per expert.

    a: e4m3 [G, Mmax, K] with row scales [G, ceil(K/128), Mmax padded to 4]; b: e4m3 [G, N, K] with block scales
    [G, ...]; masked_m: int32 [G]. Returns [G, Mmax, N], bf16 unless asked otherwise; rows from masked_m[g] on are
    zero, or untouched in `out`.
    num_sms, tile: as in `fp8_gemm_grouped`. Without a tile, room for at most 64 rows goes to the kernel of
    `fp8_gemm_masked_decode`, with the same bits; for more the cost model takes every matrix for full: where far fewer
    rows than Mmax are usual, a tile of 64 rows may serve better.
    """
    check.check_fp8("a", a, 3)
    check.check_row_scale("scale_a", scale_a, a)
    check.check_fp8("b", b, 3, a.device)
    check.check_same_size("b", b, 0, a.shape[0], "a has matrices")
    check.check_same_size("b", b, 2, a.shape[2], "a has columns")
    check.check_block_scale("scale_b", scale_b, b)
    check.check_index("masked_m", masked_m, a.shape[0], a.device)
    check.check_accumulation(accumulation)
    check.check_num_sms(num_sms)
    knobs = (num_sms, *check.check_tile(tile, check.FP8_GROUPED_TILES))
    dtype = check.check_output(out, out_dtype, torch.bfloat16, (*a.shape[:2], b.shape[1]), a)
    if out is None:
        return ops.fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, dtype, accumulation, *knobs)
    ops.fp8_gemm_masked_(a, scale_a, b, scale_b, masked_m, out, accumulation, *knobs)
    return out


def fp8_gemm_decode(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    split_k: int | None = None,
    num_sms: int = 0,
    prefetch_weights: bool = False,
) -> torch.Tensor:
    """`fp8_gemm` of at most 64 rows, where reading the weight once is all that takes time: decoding.

    a: e4m3 [M, K] with row scales, M <= 64; b: e4m3 [N, K] with block scales. Returns [M, N], bf16 unless asked
    otherwise.

    split_k: 1, 2, 4 or 8 ranges of K that are summed side by side. The S = ceil(K/128) slices of 128 are divided
    so that range r goes from slice r S / split_k to (r + 1) S / split_k, both rounded down; each range accumulates
    as `fp8_gemm` does, from zero; then the ranges are added in fp32, ascending, and rounded once. None: the largest
    that gives at most 128 blocks of 128 columns of D and at least 4 slices to each range
    (`_gemm_checks.choose_split_k`), which depends on N and K alone: the bits of a row are the same in any batch and
    on any machine. With split_k=1 they are those of `fp8_gemm`.

    Two knobs of the kernel, which never change a bit of the result and which the reference ignores:
    num_sms: multiprocessors that it may use (at least one cluster of split_k blocks runs); 0: all.
    prefetch_weights: let the kernel load b before the previous kernel of the stream has ended. Only if that one does
    not write b: true of a model's weights while decoding, not after an optimiser step or a quantisation of b.
    """
    check.check_fp8("a", a, 2)
    check.check_decode_rows(a, "fp8_gemm")
    check.check_row_scale("scale_a", scale_a, a)
    check.check_fp8("b", b, 2, a.device)
    check.check_same_size("b", b, 1, a.shape[1], "a has columns")
    check.check_block_scale("scale_b", scale_b, b)
    split = check.check_split_k(split_k, *b.shape)
    check.check_num_sms(num_sms)
    shape = (a.shape[0], b.shape[0])
    dtype = check.check_output(out, out_dtype, torch.bfloat16, shape, a)
    knobs = (num_sms, bool(prefetch_weights))
    if out is None:
        return decode_ops.fp8_gemm_decode(a, scale_a, b, scale_b, dtype, split, *knobs)
    decode_ops.fp8_gemm_decode_(a, scale_a, b, scale_b, out, split, *knobs)
    return out


def fp8_gemm_masked_decode(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> torch.Tensor:
    """`fp8_gemm_masked` with room for at most 64 rows in a group, bound by reading the weights of the groups in use.

    Arguments as there, Mmax <= 64 and G <= 512. Returns [G, Mmax, N]; rows from masked_m[g] on are zero, or untouched
    in `out` - and then a group without rows costs nothing. masked_m outside of 0..Mmax counts as the nearer end.
    The bits are those of `fp8_gemm` on each group's rows. num_sms: see `fp8_gemm_decode`.
    """
    check.check_fp8("a", a, 3)
    check.check_decode_rows(a, "fp8_gemm_masked")
    check.check_decode_groups(a)
    check.check_row_scale("scale_a", scale_a, a)
    check.check_fp8("b", b, 3, a.device)
    check.check_same_size("b", b, 0, a.shape[0], "a has matrices")
    check.check_same_size("b", b, 2, a.shape[2], "a has columns")
    check.check_block_scale("scale_b", scale_b, b)
    check.check_index("masked_m", masked_m, a.shape[0], a.device)
    check.check_num_sms(num_sms)
    dtype = check.check_output(out, out_dtype, torch.bfloat16, (*a.shape[:2], b.shape[1]), a)
    if out is None:
        return decode_ops.fp8_gemm_masked_decode(a, scale_a, b, scale_b, masked_m, dtype, num_sms)
    decode_ops.fp8_gemm_masked_decode_(a, scale_a, b, scale_b, masked_m, out, num_sms)
    return out


def fp8_wgrad(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    accumulation: str = "exact",
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """D = A^T B over tokens, from operands that are stored transposed with 128x1 scales: Wgrad.

    a_t: e4m3 [M, T] and b_t: e4m3 [N, T], tokens contiguous, each with row scales along T
    ([ceil(T/128), M or N padded to 4]), as `quantize_128x1` writes them. Returns [M, N], fp32 unless asked
    otherwise. For the gradient of y = x W^T pass dy as a and x as b.

    num_sms and tile are knobs of the kernel as in `fp8_gemm`; tile is one of `_gemm_checks.FP8_WGRAD_TILES`.
    """
    check.check_fp8("a_t", a_t, 2)
    check.check_row_scale("scale_a", scale_a, a_t)
    check.check_fp8("b_t", b_t, 2, a_t.device)
    check.check_same_size("b_t", b_t, 1, a_t.shape[1], "a_t has tokens")
    check.check_row_scale("scale_b", scale_b, b_t)
    check.check_accumulation(accumulation)
    check.check_num_sms(num_sms)
    knobs = (num_sms, *check.check_tile(tile, check.FP8_WGRAD_TILES))
    shape = (a_t.shape[0], b_t.shape[0])
    dtype = check.check_output(out, out_dtype, torch.float32, shape, a_t, accumulate)
    if out is None:
        return ops.fp8_wgrad(a_t, scale_a, b_t, scale_b, dtype, accumulation, *knobs)
    ops.fp8_wgrad_(a_t, scale_a, b_t, scale_b, out, accumulate, accumulation, *knobs)
    return out


def fp8_wgrad_grouped(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    accumulation: str = "exact",
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`fp8_wgrad` of every expert over its own tokens: D[g] = A[tokens of g]^T B[tokens of g].

    a_t: e4m3 [M, T], b_t: e4m3 [N, T]; offsets: int32 [G+1], multiples of 128 (the padded offsets that
    `quantize_128x1` returns). Returns [G, M, N], fp32 unless asked otherwise. A group without tokens gives
    zeros; with `accumulate` its part of `out` is left alone. Kernels never read offsets on the host, and of offsets
    that are no multiples of 128, descend or reach past T they take the whole tiles of 128 that exist.

    num_sms and tile: as in `fp8_wgrad`.
    """
    check.check_fp8("a_t", a_t, 2)
    check.check_row_scale("scale_a", scale_a, a_t)
    check.check_fp8("b_t", b_t, 2, a_t.device)
    check.check_same_size("b_t", b_t, 1, a_t.shape[1], "a_t has tokens")
    check.check_row_scale("scale_b", scale_b, b_t)
    groups = check.check_group_ends(offsets, a_t.device)
    check.check_accumulation(accumulation)
    check.check_num_sms(num_sms)
    knobs = (num_sms, *check.check_tile(tile, check.FP8_WGRAD_TILES))
    shape = (groups, a_t.shape[0], b_t.shape[0])
    dtype = check.check_output(out, out_dtype, torch.float32, shape, a_t, accumulate)
    if out is None:
        return ops.fp8_wgrad_grouped(a_t, scale_a, b_t, scale_b, offsets, dtype, accumulation, *knobs)
    ops.fp8_wgrad_grouped_(a_t, scale_a, b_t, scale_b, offsets, out, accumulate, accumulation, *knobs)
    return out


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """D = A B^T in high precision, differentiable in a and b.

    a: [M, K], b: [N, K], both bf16, fp32 or fp64. Returns [M, N] in the operands' dtype unless asked otherwise
    (sums are fp32, fp64 for fp64). The gradient is rounded to the operands' dtype before it is multiplied.
    """
    check.check_pair(a, b, 2, 2)
    check.check_same_size("b", b, 1, a.shape[1], "a has columns")
    dtype = check.check_output(out, out_dtype, a.dtype, (a.shape[0], b.shape[0]), a, accumulate)
    check.check_no_gradient(out, a, b)
    knobs = check.check_knobs(num_sms, tile)
    if out is None:
        return ops.gemm(a, b, dtype, *knobs)
    ops.gemm_(a, b, out, accumulate, *knobs)
    return out


def gemm_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`gemm` of every expert on its own rows, differentiable in a and b: D[rows of g] = A[rows of g] B[g]^T.

    a: [M, K], b: [G, N, K], offsets: int32 [G+1]. Returns [M, N]; rows outside the offsets are zero and have zero
    gradients, or stay untouched in `out`.
    """
    check.check_pair(a, b, 2, 3)
    check.check_same_size("b", b, 2, a.shape[1], "a has columns")
    check.check_index("offsets", offsets, b.shape[0] + 1, a.device)
    dtype = check.check_output(out, out_dtype, a.dtype, (a.shape[0], b.shape[1]), a)
    check.check_no_gradient(out, a, b)
    knobs = check.check_knobs(num_sms, tile)
    if out is None:
        return ops.gemm_grouped(a, b, offsets, dtype, *knobs)
    ops.gemm_grouped_(a, b, offsets, out, *knobs)
    return out


def gemm_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    masked_m: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`gemm` over a batch in which matrix g has masked_m[g] rows, differentiable in a and b.

    a: [G, Mmax, K], b: [G, N, K], masked_m: int32 [G]. Returns [G, Mmax, N]; rows from masked_m[g] on are zero and
    have zero gradients, or stay untouched in `out`.
    """
    check.check_pair(a, b, 3, 3)
    check.check_same_size("b", b, 0, a.shape[0], "a has matrices")
    check.check_same_size("b", b, 2, a.shape[2], "a has columns")
    check.check_index("masked_m", masked_m, a.shape[0], a.device)
    dtype = check.check_output(out, out_dtype, a.dtype, (*a.shape[:2], b.shape[1]), a)
    check.check_no_gradient(out, a, b)
    knobs = check.check_knobs(num_sms, tile)
    if out is None:
        return ops.gemm_masked(a, b, masked_m, dtype, *knobs)
    ops.gemm_masked_(a, b, masked_m, out, *knobs)
    return out


def wgrad(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """D = A^T B over tokens in high precision, differentiable in a and b.

    a: [T, M], b: [T, N] (tokens first, unlike `fp8_wgrad`, whose operands are stored transposed). Returns [M, N]
    in the operands' dtype unless asked otherwise. For the gradient of y = x W^T pass dy as a and x as b.
    """
    check.check_pair(a, b, 2, 2)
    check.check_same_size("b", b, 0, a.shape[0], "a has tokens")
    dtype = check.check_output(out, out_dtype, a.dtype, (a.shape[1], b.shape[1]), a, accumulate)
    check.check_no_gradient(out, a, b)
    knobs = check.check_knobs(num_sms, tile)
    if out is None:
        return ops.wgrad(a, b, dtype, *knobs)
    ops.wgrad_(a, b, out, accumulate, *knobs)
    return out


def wgrad_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`wgrad` of every expert over its own tokens, differentiable: D[g] = A[tokens of g]^T B[tokens of g].

    a: [T, M], b: [T, N], offsets: int32 [G+1] with no alignment. Returns [G, M, N]. A group without tokens gives
    zeros; with `accumulate` its part of `out` is left alone.
    """
    check.check_pair(a, b, 2, 2)
    check.check_same_size("b", b, 0, a.shape[0], "a has tokens")
    shape = (check.check_group_ends(offsets, a.device), a.shape[1], b.shape[1])
    dtype = check.check_output(out, out_dtype, a.dtype, shape, a, accumulate)
    check.check_no_gradient(out, a, b)
    knobs = check.check_knobs(num_sms, tile)
    if out is None:
        return ops.wgrad_grouped(a, b, offsets, dtype, *knobs)
    ops.wgrad_grouped_(a, b, offsets, out, accumulate, *knobs)
    return out
