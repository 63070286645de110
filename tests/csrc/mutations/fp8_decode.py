"""Mutation runs of fp8_decode."""

from __future__ import annotations

import torch

from deepseek_ops import gemm
from deepseek_ops import quantize as quant
from tests.csrc.mutation import Kernel, on_checked


def kernels() -> list[Kernel]:
    """A cluster that takes several tiles and a batch with empty groups, through the native module of `checked`."""
    # Positive operands: sums grow with K, so that a lost promotion shows in the bits.
    generator = torch.Generator().manual_seed(0)
    a, scale_a = quant.quantize_1x128(torch.rand(13, 2700, generator=generator))
    b, scale_b = quant.quantize_128x128(torch.rand(400, 2700, generator=generator))
    rows = [quant.quantize_1x128(torch.rand(9, 1400, generator=generator)) for _ in range(5)]
    batch = [torch.stack(x) for x in zip(*rows, strict=True)]
    batch += quant.quantize_128x128(torch.rand(5, 136, 1400, generator=generator))
    masked_m = torch.tensor([0, 9, 3, 0, 1], dtype=torch.int32)
    knobs = {"split_k": 4, "num_sms": 4, "prefetch_weights": True}
    return [
        on_checked(
            "fp8_decode, clusters of 4", lambda: [gemm.fp8_gemm_decode(a, scale_a, b, scale_b, **knobs)]
        ),
        on_checked("fp8_decode, batch", lambda: [gemm.fp8_gemm_masked_decode(*batch, masked_m, num_sms=1)]),
    ]
