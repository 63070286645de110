"""Multi-head Latent Attention (report section 2.1.1), in two forms of the same function.

Training and prefill multiply the latent out to keys and values per head: `MLA`, here. Decoding leaves it compressed and
moves W_UK to the query and W_UV to the output: `AbsorbedMLA` in `examples/model/plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deepseek_ops.attention import cache_write_, mla_attention
from deepseek_ops.nn import Fp8Linear, attention_linear, quantize_input
from deepseek_ops.rope import rope
from examples.model.config import ModelConfig
from examples.model.layers import RMSNorm, activation_dtype, make_linear
from examples.model.recompute import dropping

# The released weights' code gives the two latent norms this eps whatever the configuration says.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of a pass stand.

    positions: int64 [T], in their sequence. cu_seqlens: int32 [n + 1], borders of sequences that do not see each other.
    inv_freq: fp32 [rope / 2].
    With a cache: slots int64 [T] says where each token is written; `block_table` int32 [B, blocks] and `lengths`
    int32 [B] (these tokens included) what a decoding step reads; batch_invariant as in `LatentCache`.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    inv_freq: torch.Tensor
    slots: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    batch_invariant: bool = False


def row_borders(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Borders of `rows` sequences of `length` tokens each: int32 [rows + 1]."""
    if length == 0:
        return torch.zeros(rows + 1, dtype=torch.int32, device=device)
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


class MLA(nn.Module):
    """Parameters: `qkv_a` [q_lora + kv_lora + rope, D] (or `q` [H * (nope + rope), D] and `kv_a`, without query
    compression), `q_norm`, `kv_norm`, `q_b` [H * (nope + rope), q_lora], `kv_b` [H * (nope + v), kv_lora],
    `o` [D, H * v]. The two down-projections of one input are one GEMM."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.scale, self.recompute = config.num_heads, config.softmax_scale, config.recompute
        self.nope, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.q_rank, self.kv_rank = config.q_lora_rank or 0, config.kv_lora_rank
        d, precision = config.hidden_size, config.precision
        dtype = activation_dtype(precision)
        q_width = self.heads * config.qk_head_dim
        if self.q_rank:
            self.qkv_a = make_linear(d, self.q_rank + config.latent_width, "linear", precision)
            self.q_norm = RMSNorm(self.q_rank, LATENT_NORM_EPS, dtype)
            self.q_b = make_linear(self.q_rank, q_width, "linear", precision)
        else:
            self.q = make_linear(d, q_width, "linear", precision)
            self.kv_a = make_linear(d, config.latent_width, "linear", precision)
        self.kv_norm = RMSNorm(self.kv_rank, LATENT_NORM_EPS, dtype)
        self.kv_b = make_linear(self.kv_rank, self.heads * (self.nope + self.v_dim), "linear", precision)
        self.o = make_linear(self.heads * self.v_dim, d, "after_attention", precision)

    def forward(self, x_TD: torch.Tensor, layout: Layout, pages: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention inside each sequence of `layout`; with `pages`, the latents are also written to the cache.

        [T, D] -> [T, D].
        """
        c_q, c_kv, k_pe_raw = self._compress(x_TD)

        def norms() -> tuple[torch.Tensor, ...]:
            return (self.q_norm(c_q) if self.q_rank else c_q), self.kv_norm(c_kv)

        def expand(q_latent: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                self._queries(q_latent, layout),
                self.kv_b(latent),
                rope(k_pe_raw, layout.positions, layout.inv_freq),
            )

        latents = norms()
        with dropping(latents, norms, active=self.recompute):
            q, kv, k_pe = expand(*latents)
        if pages is not None:
            cache_write_(pages, latents[1], k_pe, layout.slots)
        k_nope, v = kv.view(-1, self.heads, self.nope + self.v_dim).split([self.nope, self.v_dim], dim=-1)
        with dropping((q, kv, k_pe), lambda: expand(*norms()), active=self.recompute):
            operands = q, k_nope, k_pe, v, layout.cu_seqlens
            if isinstance(
                self.o, Fp8Linear
            ):  # one E5M6 copy of what lies between serves both backward passes
                return attention_linear(self.o, *operands, softmax_scale=self.scale)
            out, _ = mla_attention(*operands, softmax_scale=self.scale)
        return self.o(out.flatten(1))

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK [H, nope, kv_lora] and W_UV [H, v, kv_lora], views of `kv_b`."""
        weight = self.kv_b.weight.to(dtype).view(self.heads, self.nope + self.v_dim, self.kv_rank)
        return weight[:, : self.nope], weight[:, self.nope :]

    def _compress(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(c_q before its norm, or the whole query; c_kv before its norm; the shared key before rotation)."""
        if self.q_rank:
            return self.qkv_a(x_TD).split([self.q_rank, self.kv_rank, self.rope_dim], dim=-1)
        if isinstance(self.q, Fp8Linear):
            quantized = quantize_input(x_TD)  # once, and kept once
            return self.q(x_TD, quantized), *self.kv_a(x_TD, quantized).split(
                [self.kv_rank, self.rope_dim], dim=-1
            )
        return self.q(x_TD), *self.kv_a(x_TD).split([self.kv_rank, self.rope_dim], dim=-1)

    def _queries(self, q_latent: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[T, q_lora] (or the whole query) -> [T, H, nope + rope], rotated."""
        q_nope, q_pe = self._split_heads(self.q_b(q_latent) if self.q_rank else q_latent)
        return torch.cat((q_nope, rope(q_pe, layout.positions, layout.inv_freq)), dim=-1)

    def _split_heads(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, H * (nope + rope)] -> views [T, H, nope], [T, H, rope]."""
        return q.view(-1, self.heads, self.nope + self.rope_dim).split([self.nope, self.rope_dim], dim=-1)
