"""Copying quantised rows to the experts: bytes and scales move together, nothing is quantised twice."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import E4M3, round_up
from ..moe import permute

Pair = tuple[Tensor, Tensor]


def permute_rows(x: Pair, topk_idx: Tensor, num_experts: int) -> tuple[Pair, Tensor, Tensor]:
    """`moe.permute` of quantised rows: q e4m3 [T, D] and GEMM-ready scales -> ((rows, scales), offsets, source)."""
    q, scale = x
    # Two e4m3 make one bf16 that is moved, never computed with.
    moved, offsets, source = permute(q.view(torch.bfloat16), topk_idx, num_experts)
    return (moved.view(E4M3), _scales(scale, source, topk_idx.shape[1])), offsets, source


def gather_rows(x: Pair, source: Tensor, top_k: int) -> Pair:
    """The same copy again, for a `source` that is known: row i is token source[i] // top_k."""
    q, scale = x
    moved = q.view(torch.bfloat16).index_select(0, source // top_k).view(E4M3)
    return moved, _scales(scale, source, top_k)


def _scales(scale: Tensor, source: Tensor, top_k: int) -> Tensor:
    rows = source.shape[0]
    out = scale.new_ones((scale.shape[0], round_up(rows, 4)))
    out[:, :rows] = scale.index_select(1, source // top_k)
    return out
