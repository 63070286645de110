"""FP8 copies of master weights, refreshed once per optimizer step (report 3.3.1: masters stay in FP32)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantize import quantize_128x128, transpose_128x128


class Fp8Weight(NamedTuple):
    """E4M3 copies of a weight [N, K] (or [G, N, K]) with one scale per 128 x 128 block.

    `q`, `scale` feed Fprop; `q_t`, `scale_t` are the exact transpose, fed to Dgrad.
    """

    q: torch.Tensor
    scale: torch.Tensor
    q_t: torch.Tensor
    scale_t: torch.Tensor


class Fp8WeightCache:
    """Quantises a master weight when it changed since the last call, and only then.

    "Changed" is the tensor's version counter, which every in-place update bumps (the optimizer's included), so
    gradient accumulation over many micro-batches quantises once.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self._copies: Fp8Weight | None = None

    def __call__(self, master: torch.Tensor) -> Fp8Weight:
        """The FP8 copies of `master`, quantised now if it changed."""
        key = (master.data_ptr(), master._version)
        if self._copies is None or key != self._key:
            q, scale = quantize_128x128(master.detach())
            self._copies = Fp8Weight(q, scale, *transpose_128x128(q, scale))
            self._key = key
        return self._copies
