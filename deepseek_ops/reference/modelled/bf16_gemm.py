"""The GEMMs of bf16 operands as csrc/gemm/bf16_gemm computes them: one tensor-core accumulator over all of K.

K ascends in steps of 16, the last one filled up with zeros; each group starts a K of its own. Then the old value is
added where the op accumulates, and the sum is rounded once. Operands of another dtype have no kernel: their reference.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import gemm as reference
from ..gemm import _bounds, _fresh_rows, _store, _valid_rows
from ..tensor_core import tensor_core_accumulate


def _modelled(a: Tensor) -> bool:
    return a.dtype == torch.bfloat16


def gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    if not _modelled(a):
        return reference.gemm(a, b, out_dtype)
    return tensor_core_accumulate(a, b).to(out_dtype)


def gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, *knobs: int) -> None:
    if not _modelled(a):
        return reference.gemm_(a, b, out, accumulate)
    _store(out, tensor_core_accumulate(a, b), accumulate)


def _grouped(a: Tensor, b: Tensor, bounds: list[int], out: Tensor) -> None:
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            out[start:stop] = tensor_core_accumulate(a[start:stop], b[group])


def gemm_grouped(a: Tensor, b: Tensor, offsets: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    if not _modelled(a):
        return reference.gemm_grouped(a, b, offsets, out_dtype)
    bounds = _bounds(offsets, a.shape[0])
    out = _fresh_rows(a, b.shape[1], bounds, out_dtype)
    _grouped(a, b, bounds, out)
    return out


def gemm_grouped_(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, *knobs: int) -> None:
    if not _modelled(a):
        return reference.gemm_grouped_(a, b, offsets, out)
    _grouped(a, b, _bounds(offsets, a.shape[0]), out)


def gemm_masked(a: Tensor, b: Tensor, masked_m: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    if not _modelled(a):
        return reference.gemm_masked(a, b, masked_m, out_dtype)
    return tensor_core_accumulate(a, b).masked_fill_(~_valid_rows(a, masked_m), 0.0).to(out_dtype)


def gemm_masked_(a: Tensor, b: Tensor, masked_m: Tensor, out: Tensor, *knobs: int) -> None:
    product = gemm_masked(a, b, masked_m, out.dtype)
    out.copy_(torch.where(_valid_rows(a, masked_m), product, out))


def wgrad(a: Tensor, b: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    return gemm(a.mT, b.mT, out_dtype)


def wgrad_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, *knobs: int) -> None:
    gemm_(a.mT, b.mT, out, accumulate)


def wgrad_grouped(a: Tensor, b: Tensor, offsets: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    if not _modelled(a):
        return reference.wgrad_grouped(a, b, offsets, out_dtype)
    out = a.new_empty((offsets.shape[0] - 1, a.shape[1], b.shape[1]), dtype=out_dtype)
    wgrad_grouped_(a, b, offsets, out, False)
    return out


def wgrad_grouped_(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, accumulate: bool, *knobs: int) -> None:
    if not _modelled(a):
        return reference.wgrad_grouped_(a, b, offsets, out, accumulate)
    for group, (start, stop) in enumerate(pairwise(_bounds(offsets, a.shape[0]))):
        if start < stop:
            _store(out[group], tensor_core_accumulate(a[start:stop].mT, b[start:stop].mT), accumulate)
        elif not accumulate:
            out[group] = 0


def wgrad_masked(a: Tensor, b: Tensor, masked_m: Tensor, out_dtype: torch.dtype, *knobs: int) -> Tensor:
    if not _modelled(a):
        return reference.wgrad_masked(a, b, masked_m, out_dtype)
    missing = ~_valid_rows(a, masked_m)
    a, b = a.masked_fill(missing, 0.0), b.masked_fill(missing, 0.0)
    return tensor_core_accumulate(a.mT, b.mT).to(out_dtype)
