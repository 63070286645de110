"""What this card gives without us."""

from __future__ import annotations

import torch

from .claims import nominal_bandwidth
from .measure import compare
from .rows import Row, add_rates
from .steps import Data


def bench() -> Data:
    """A large copy, and bf16 products on random data."""
    copy = _copy_row()
    products = [_product_row(size) for size in (4096, 8192)]
    gbps, tflops = copy["candidates"]["copy"]["gbps"], products[-1]["candidates"]["cublas-bf16"]["tflops"]
    return {
        "rows": [copy, *products],
        "nominal_gbps": nominal_bandwidth(torch.cuda.get_device_name()),
        "summary": f"copy {gbps:.0f} GB/s, bf16 {tflops:.0f} TFLOP/s",
    }


def _copy_row() -> Row:
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timed = compare({"copy": lambda: target.copy_(source)})
    add_rates(timed, size=4 * source.numel())
    return {"kernel": "copy", "shape": "1 GiB", "candidates": timed}


def _product_row(size: int) -> Row:
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed = compare({"cublas-bf16": lambda: torch.mm(x, y)})
    add_rates(timed, flop=2 * size**3)
    return {"kernel": "bf16 product", "shape": f"{size}^3", "candidates": timed}
