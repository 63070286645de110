"""Rows are quantised before they are copied to experts: the bytes, scales and padding of copying first."""

import pytest
import torch

from deepseek_ops.moe import permute
from deepseek_ops.nn.dispatch import permute_rows
from deepseek_ops.quantize import quantize_1x128


@pytest.mark.parametrize(("tokens", "top_k", "width"), [(37, 3, 136), (5, 1, 8), (0, 2, 128)])
def test_quantise_then_copy_is_copy_then_quantise(tokens, top_k, width):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, width)
    x[: tokens // 2, ::5] *= 1e-9  # codes of every kind, NaN patterns of bf16 pairs among them
    if tokens:
        x[1, 0] = float("nan")
    idx = torch.rand(tokens, 8).topk(top_k, dim=1).indices
    idx[::4] = -1
    (q, scale), offsets, source = permute_rows(quantize_1x128(x, pow2=True), idx, 8)
    rows, want_offsets, want_source = permute(x, idx, 8)
    want_q, want_scale = quantize_1x128(rows, pow2=True)
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)
    assert torch.equal(offsets, want_offsets) and torch.equal(source, want_source)
