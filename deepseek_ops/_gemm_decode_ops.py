"""Declarations of FP8 products with few rows. Not differentiable: decoding has no gradients.

Each function is two ops: `name` returns a fresh output and `name_` writes into `out`. num_sms and prefetch_weights decide
how a kernel does its work, never what comes out; split_k is part of the meaning.
"""

from __future__ import annotations

from typing import Any

from ._registry import declare
from .reference import gemm_decode as reference
from .reference.modelled import gemm_decode as modelled


def _nothing(*args: Any) -> None:
    """In-place ops have no outputs."""


def _rows_by_columns(a: Any, scale_a: Any, b: Any, scale_b: Any, out_dtype: Any, *rest: Any) -> Any:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _batch_by_columns(a: Any, sa: Any, b: Any, sb: Any, masked_m: Any, out_dtype: Any, *rest: Any) -> Any:
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype)


fp8_gemm_decode = declare(
    "fp8_gemm_decode(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, ScalarType out_dtype, int split_k, "
    "int num_sms=0, bool prefetch_weights=False) -> Tensor",
    reference=reference.fp8_gemm_decode,
    fake=_rows_by_columns,
    modelled=modelled.fp8_gemm_decode,
)
fp8_gemm_decode_ = declare(
    "fp8_gemm_decode_(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor(a!) out, int split_k, "
    "int num_sms=0, bool prefetch_weights=False) -> ()",
    reference=reference.fp8_gemm_decode_,
    fake=_nothing,
    modelled=modelled.fp8_gemm_decode_,
)
fp8_gemm_masked_decode = declare(
    "fp8_gemm_masked_decode(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor masked_m, "
    "ScalarType out_dtype, int num_sms=0) -> Tensor",
    reference=reference.fp8_gemm_masked_decode,
    fake=_batch_by_columns,
    modelled=modelled.fp8_gemm_masked_decode,
)
fp8_gemm_masked_decode_ = declare(
    "fp8_gemm_masked_decode_(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor masked_m, "
    "Tensor(a!) out, int num_sms=0) -> ()",
    reference=reference.fp8_gemm_masked_decode_,
    fake=_nothing,
    modelled=modelled.fp8_gemm_masked_decode_,
)
