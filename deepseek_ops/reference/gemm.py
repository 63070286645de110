"""Meaning of the GEMM family (report 3.3). D = A B^T; a fresh result is `name`, writing into `out` is `name_`.

Three meanings of `accumulation` for e4m3 operands: "exact" multiplies the dequantised operands in one fp32
product; "hopper" and "hopper_unpromoted" are the tensor core of `reference/tensor_core.py`.
Grouped ops read `offsets` on the host and loop over groups, where fewer than all rows of `a` meet one `b`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from .._checks import fail
from .quantize import dequantize_rows, rows_of_blocks
from .tensor_core import SLICE, matmul_promoted, matmul_unpromoted

# --- shared pieces ---------------------------------------------------------------------------------------------


def _fp8_product(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, accumulation: str
) -> torch.Tensor:
    """fp32 [..., M, N] from e4m3 [..., M, K] and [..., N, K]; scales [..., ceil(K/128), M or more] and N."""
    scale_a, scale_b = scale_a[..., : a.shape[-2]], scale_b[..., : b.shape[-2]]
    if accumulation == "hopper":
        return matmul_promoted(a, scale_a, b, scale_b)
    if accumulation == "hopper_unpromoted":
        return matmul_unpromoted(a, scale_a, b, scale_b)
    values = dequantize_rows(a, scale_a.mT, torch.float32)
    return values @ dequantize_rows(b, scale_b.mT, torch.float32).mT


def _store(out: torch.Tensor, value: torch.Tensor, accumulate: bool) -> None:
    """Overwrite, or add with one rounding: the sum is taken in the precision of `value` (fp32 or fp64)."""
    out.copy_(out.to(value.dtype) + value if accumulate else value)


def _bounds(offsets: torch.Tensor, rows: int, multiple: int = 1) -> list[int]:
    """Offsets on the host. What they hold cannot be checked before the op runs, so it is checked here."""
    bounds: list[int] = offsets.tolist()
    ascending = all(x <= y for x, y in pairwise(bounds))
    if not ascending or bounds[0] < 0 or bounds[-1] > rows:
        fail("offsets", f"must ascend within 0..{rows}", bounds)
    if any(x % multiple for x in bounds):
        fail("offsets", f"must be multiples of {multiple}", bounds)
    return bounds


def _fresh_rows(like: torch.Tensor, n: int, bounds: list[int], dtype: torch.dtype) -> torch.Tensor:
    """An [M, N] result whose rows outside the groups are zero and whose other rows are still to be written."""
    out = like.new_empty((like.shape[0], n), dtype=dtype)
    out[: bounds[0]] = 0
    out[bounds[-1] :] = 0
    return out


def _valid_rows(like: torch.Tensor, masked_m: torch.Tensor) -> torch.Tensor:
    """bool [G, Mmax, 1]: which rows of a masked batch exist."""
    rows = torch.arange(like.shape[1], device=like.device)
    return (rows < masked_m.unsqueeze(-1)).unsqueeze(-1)


# --- e4m3 operands ---------------------------------------------------------------------------------------------


def fp8_gemm(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    """The last three, here and below, steer kernels and mean nothing."""
    return _fp8_product(a, scale_a, b, rows_of_blocks(scale_b, b.shape[0]).mT, accumulation).to(out_dtype)


def fp8_gemm_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    _store(out, fp8_gemm(a, scale_a, b, scale_b, torch.float32, accumulation), accumulate)


def _fp8_gemm_rows(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bounds: list[int],
    out: torch.Tensor,
    accumulation: str,
) -> None:
    columns = rows_of_blocks(scale_b, b.shape[1]).mT
    for group in range(b.shape[0]):
        rows = slice(bounds[group], bounds[group + 1])
        if rows.start < rows.stop:
            out[rows] = _fp8_product(a[rows], scale_a[:, rows], b[group], columns[group], accumulation)


def fp8_gemm_grouped(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    bounds = _bounds(offsets, a.shape[0])
    out = _fresh_rows(a, b.shape[1], bounds, out_dtype)
    _fp8_gemm_rows(a, scale_a, b, scale_b, bounds, out, accumulation)
    return out


def fp8_gemm_grouped_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    _fp8_gemm_rows(a, scale_a, b, scale_b, _bounds(offsets, a.shape[0]), out, accumulation)


def fp8_gemm_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    product = _fp8_product(a, scale_a, b, rows_of_blocks(scale_b, b.shape[1]).mT, accumulation)
    return product.masked_fill_(~_valid_rows(a, masked_m), 0.0).to(out_dtype)


def fp8_gemm_masked_(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    masked_m: torch.Tensor,
    out: torch.Tensor,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    product = fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out.dtype, accumulation)
    out.copy_(torch.where(_valid_rows(a, masked_m), product, out))


def fp8_wgrad(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    return _fp8_product(a_t, scale_a, b_t, scale_b, accumulation).to(out_dtype)


def fp8_wgrad_(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    _store(out, _fp8_product(a_t, scale_a, b_t, scale_b, accumulation), accumulate)


def fp8_wgrad_grouped_(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> None:
    bounds = _bounds(offsets, a_t.shape[1], SLICE)
    for group in range(out.shape[0]):
        tokens = slice(bounds[group], bounds[group + 1])
        tiles = slice(tokens.start // SLICE, tokens.stop // SLICE)
        if tokens.start < tokens.stop:
            operands = a_t[:, tokens], scale_a[tiles], b_t[:, tokens], scale_b[tiles]
            _store(out[group], _fp8_product(*operands, accumulation), accumulate)
        elif not accumulate:
            out[group] = 0


def fp8_wgrad_grouped(
    a_t: torch.Tensor,
    scale_a: torch.Tensor,
    b_t: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
    accumulation: str,
    num_sms: int = 0,
    tile_rows: int = 0,
    tile_columns: int = 0,
) -> torch.Tensor:
    out = a_t.new_empty((offsets.shape[0] - 1, a_t.shape[0], b_t.shape[0]), dtype=out_dtype)
    fp8_wgrad_grouped_(a_t, scale_a, b_t, scale_b, offsets, out, False, accumulation)
    return out


# --- bf16, fp32 and fp64 operands: `knobs` steer kernels and mean nothing here ---------------------------------


def _widen(a: torch.Tensor, b: torch.Tensor, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 operands as fp32 where the sum must not be rounded to bf16 first."""
    if wide and a.dtype == torch.bfloat16:
        return a.to(torch.float32), b.to(torch.float32)
    return a, b


def _grouped_mm_takes(*operands: torch.Tensor) -> bool:
    """Whether torch's grouped_mm accepts these: no fp64, nothing empty, rows or columns of whole 16 bytes."""
    for x in operands:
        if x.dtype == torch.float64 or x.numel() == 0:
            return False
        (rows, columns), (row_step, column_step) = x.shape[-2:], x.stride()[-2:]
        by_rows = column_step == 1 and row_step >= columns
        by_columns = row_step == 1 and column_step >= rows
        steps = [x.stride()[i] for i in range(x.ndim - 2)] + [row_step if by_rows else column_step]
        aligned = all(step * x.element_size() % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0
        if not (aligned and (by_rows or by_columns)):
            return False
    return True


def gemm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *knobs: int) -> torch.Tensor:
    a, b = _widen(a, b, out_dtype != a.dtype)
    return torch.mm(a, b.mT).to(out_dtype)


def gemm_(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool, *knobs: int) -> None:
    a, b = _widen(a, b, accumulate or out.dtype != a.dtype)
    _store(out, torch.mm(a, b.mT), accumulate)


def gemm_grouped(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype, *knobs: int
) -> torch.Tensor:
    bounds = _bounds(offsets, a.shape[0])
    a, b = _widen(a, b, out_dtype != a.dtype)
    rows = slice(bounds[0], bounds[-1])
    inside, b_t = a[rows], b.mT
    if out_dtype == a.dtype and _grouped_mm_takes(inside, b_t):
        # One C++ loop instead of one in Python: the same speed on large groups, twice as fast on many small ones.
        product = F.grouped_mm(inside, b_t, offs=offsets[1:] - offsets[:1])
        if inside.shape[0] == a.shape[0]:
            return product
        out = _fresh_rows(a, b.shape[1], bounds, out_dtype)
        out[rows] = product
        return out
    out = _fresh_rows(a, b.shape[1], bounds, out_dtype)
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            out[start:stop] = torch.mm(a[start:stop], b_t[group])
    return out


def gemm_grouped_(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, *knobs: int
) -> None:
    bounds = _bounds(offsets, a.shape[0])
    rows = slice(bounds[0], bounds[-1])
    out[rows] = gemm_grouped(a[rows], b, offsets - offsets[:1], out.dtype)


def gemm_masked(
    a: torch.Tensor, b: torch.Tensor, masked_m: torch.Tensor, out_dtype: torch.dtype, *knobs: int
) -> torch.Tensor:
    a, b = _widen(a, b, out_dtype != a.dtype)
    return torch.bmm(a, b.mT).masked_fill_(~_valid_rows(a, masked_m), 0.0).to(out_dtype)


def gemm_masked_(
    a: torch.Tensor, b: torch.Tensor, masked_m: torch.Tensor, out: torch.Tensor, *knobs: int
) -> None:
    product = gemm_masked(a, b, masked_m, out.dtype)
    out.copy_(torch.where(_valid_rows(a, masked_m), product, out))


def wgrad(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *knobs: int) -> torch.Tensor:
    a, b = _widen(a, b, out_dtype != a.dtype)
    return torch.mm(a.mT, b).to(out_dtype)


def wgrad_(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool, *knobs: int) -> None:
    a, b = _widen(a, b, accumulate or out.dtype != a.dtype)
    _store(out, torch.mm(a.mT, b), accumulate)


def _wgrad_groups(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor | None, accumulate: bool
) -> torch.Tensor:
    """[G, M, N] of operands that need no widening, written into `out` where one is given."""
    bounds = _bounds(offsets, a.shape[0])
    rows = slice(bounds[0], bounds[-1])
    a_t, inside = a[rows].mT, b[rows]
    if out is None and _grouped_mm_takes(a_t, inside):
        return F.grouped_mm(a_t, inside, offs=offsets[1:] - offsets[:1])
    if out is None:
        out = a.new_empty((len(bounds) - 1, a.shape[1], b.shape[1]))
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            _store(out[group], torch.mm(a[start:stop].mT, b[start:stop]), accumulate)
        elif not accumulate:
            out[group] = 0
    return out


def wgrad_grouped(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype, *knobs: int
) -> torch.Tensor:
    a, b = _widen(a, b, out_dtype != a.dtype)
    return _wgrad_groups(a, b, offsets, None, False).to(out_dtype)


def wgrad_grouped_(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, accumulate: bool, *knobs: int
) -> None:
    a, b = _widen(a, b, accumulate or out.dtype != a.dtype)
    _wgrad_groups(a, b, offsets, out, accumulate)


def wgrad_masked(
    a: torch.Tensor, b: torch.Tensor, masked_m: torch.Tensor, out_dtype: torch.dtype, *knobs: int
) -> torch.Tensor:
    a, b = _widen(a, b, out_dtype != a.dtype)
    missing = ~_valid_rows(a, masked_m)  # rows that do not exist may hold NaN: both sides are cleared
    return torch.bmm(a.masked_fill(missing, 0.0).mT, b.masked_fill(missing, 0.0)).to(out_dtype)
