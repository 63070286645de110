"""Multi-Token Prediction (report section 2.2): module k predicts token i + k + 1 from position i, keeping the causal chain.

h_k = Block(M_k [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_{k-1})]). The report writes the two halves in the other order; this is
the order of the released weights. h_0 is the main model's state after its final norm, as every implementation that
loads those weights has it; the report does not say. Embedding and output head are the main model's own.
"""

from __future__ import annotations

import torch
from torch import nn

from examples.model.block import Block
from examples.model.config import ModelConfig
from examples.model.layers import RMSNorm, activation_dtype, make_linear
from examples.model.mla import Layout
from examples.model.moe import Routing
from examples.model.recompute import dropping


class MTPModule(nn.Module):
    """One depth: `emb_norm`, `hidden_norm`, `proj` [D, 2D], a MoE `block`, and its own output `norm`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dtype = activation_dtype(config.precision)
        self.recompute = config.recompute
        self.emb_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.proj = make_linear(2 * config.hidden_size, config.hidden_size, "linear", config.precision)
        self.block = Block(config, dense=config.num_dense_layers >= config.num_layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        emb_TD: torch.Tensor,
        layout: Layout,
        record: list[Routing] | None = None,
    ) -> torch.Tensor:
        """(state of the depth before, embedding of the token k ahead) [T, D] -> state of this depth, normed: [T, D]."""

        def join() -> tuple[torch.Tensor, ...]:
            return (torch.cat((self.emb_norm(emb_TD), self.hidden_norm(hidden_TD)), dim=-1),)

        (joined,) = join()
        with dropping((joined,), join, active=self.recompute):
            x = self.proj(joined)
        delta, residual = self.block(None, x, layout, record)
        return self.norm.add(delta, residual)[0]
