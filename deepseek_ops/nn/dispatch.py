"""Copying quantised rows to the experts: bytes and scales move together, nothing is quantised twice."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import E4M3, round_up
from ..moe import permute

Pair = tuple[Tensor, Tensor]


def permute_rows(x: Pair, topk_idx: Tensor, num_experts: int) -> tuple[Pair, Tensor, Tensor]:
    """`moe.permute` of quantised rows: q e4m3 [T, D] and GEMM-ready scales -> ((rows, scales), offsets, source).

    The order depends on topk_idx alone: called again in backward, with a gradient, it puts rows where they were.
    """
    q, scale = x
    # Two e4m3 make one bf16 that is moved, never computed with.
    moved, offsets, source = permute(q.view(torch.bfloat16), topk_idx, num_experts)
    rows = source.shape[0]
    scales = scale.new_ones((scale.shape[0], round_up(rows, 4)))
    scales[:, :rows] = scale.index_select(1, source // topk_idx.shape[1])
    return (moved.view(E4M3), scales), offsets, source
