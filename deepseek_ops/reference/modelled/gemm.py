"""FP8 products with the kernels' bits: "exact" leaves the order of the sum to the backend, kernels give that of "hopper".

So each op here is the reference's own, asked for "hopper" where the caller asked for "exact".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .. import gemm as reference

__all__ = [
    "fp8_gemm",
    "fp8_gemm_",
    "fp8_gemm_grouped",
    "fp8_gemm_grouped_",
    "fp8_gemm_masked",
    "fp8_gemm_masked_",
    "fp8_wgrad",
    "fp8_wgrad_",
    "fp8_wgrad_grouped",
    "fp8_wgrad_grouped_",
]


def as_kernels_sum(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, a reference with an argument `accumulation`, with the tensor core's sum where it says "exact"."""
    place = list(inspect.signature(op).parameters).index("accumulation")

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place and args[place] == "exact":
            args = (*args[:place], "hopper", *args[place + 1 :])
        elif kwargs.get("accumulation") == "exact":
            kwargs = {**kwargs, "accumulation": "hopper"}
        return op(*args, **kwargs)

    return run


fp8_gemm = as_kernels_sum(reference.fp8_gemm)
fp8_gemm_ = as_kernels_sum(reference.fp8_gemm_)
fp8_gemm_grouped = as_kernels_sum(reference.fp8_gemm_grouped)
fp8_gemm_grouped_ = as_kernels_sum(reference.fp8_gemm_grouped_)
fp8_gemm_masked = as_kernels_sum(reference.fp8_gemm_masked)
fp8_gemm_masked_ = as_kernels_sum(reference.fp8_gemm_masked_)
fp8_wgrad = as_kernels_sum(reference.fp8_wgrad)
fp8_wgrad_ = as_kernels_sum(reference.fp8_wgrad_)
fp8_wgrad_grouped = as_kernels_sum(reference.fp8_wgrad_grouped)
fp8_wgrad_grouped_ = as_kernels_sum(reference.fp8_wgrad_grouped_)
