"""One Transformer block: pre-norm attention, pre-norm FFN (dense or MoE).

The residual stream travels as (delta, residual), their sum being the block's output, so that each addition happens
together with the norm that follows it.
"""

from __future__ import annotations

import torch
from torch import nn

from examples.model.config import ModelConfig
from examples.model.layers import RMSNorm, activation_dtype, make_ffn
from examples.model.mla import MLA, Layout
from examples.model.moe import MoE, Routing
from examples.model.recompute import dropping


class Block(nn.Module):
    """`dense` blocks have one FFN of `dense_inner_size`, the others a MoE."""

    def __init__(self, config: ModelConfig, *, dense: bool) -> None:
        super().__init__()
        dtype = activation_dtype(config.precision)
        self.recompute = config.recompute
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attn = MLA(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.ffn: nn.Module = make_ffn(config, config.dense_inner_size) if dense else MoE(config)

    def forward(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        layout: Layout,
        record: list[Routing] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(delta, residual) [T, D] each -> the same for the next block; delta None stands for 0.

        `record` collects routing decisions.
        """
        x, residual = self.attn_norm.add(delta, residual)
        with self._dropping(x, self.attn_norm, residual):
            delta = self.attn(x, layout)
        x, residual = self.ffn_norm.add(delta, residual)
        with self._dropping(x, self.ffn_norm, residual):
            delta = self.ffn(x, record) if isinstance(self.ffn, MoE) else self.ffn(x)
        return delta, residual

    def _dropping(self, x: torch.Tensor, norm: RMSNorm, residual: torch.Tensor):
        return dropping((x,), lambda: (norm(residual),), active=self.recompute)
