"""The ops of a decoding step: the public functions, or what they would run in the end.

A public op checks its arguments, asks which backend is wanted and whether somebody watches; on a CPU that costs a few
microseconds, as much as the arithmetic of one token. `DecodePlan` builds every argument itself, so that a step may settle
these questions once for all its ops (`deepseek_ops.runs_reference`). The functions are the same, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import deepseek_ops
from deepseek_ops import activation, attention, moe, norm, reference
from deepseek_ops.rope import rope


class Calls(NamedTuple):
    """Each with the arguments that the public op of that name has."""

    rms_norm: Callable[..., torch.Tensor]
    rms_norm_residual: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[..., torch.Tensor]
    cache_write_: Callable[..., None]
    mla_decode: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    route: Callable[..., tuple[torch.Tensor, ...]]
    swiglu: Callable[..., torch.Tensor]


def _mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    latent_dim: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attention.mla_decode(
        q, cache, block_table, lengths, cu_seqlens, softmax_scale, latent_dim, batch_invariant
    )


def _route(logits: torch.Tensor, bias: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    return reference.moe.route(logits, bias, **options, normalize=True)


PUBLIC = Calls(
    norm.rms_norm,
    norm.rms_norm_residual,
    rope,
    attention.cache_write_,
    attention.mla_decode,
    moe.route,
    activation.swiglu,
)
DIRECT = Calls(
    lambda x, weight, eps: reference.norm.rms_norm(x, weight, eps)[0],
    lambda x, residual, weight, eps: reference.norm.rms_norm_residual(x, residual, weight, eps)[:2],
    lambda x, positions, inv_freq: reference.rope.rope(x, positions, inv_freq, False),
    reference.latent_cache.cache_write_,
    _mla_decode,
    _route,
    lambda gate_up, weight=None: reference.activation.swiglu(gate_up, weight),
)


def calls_for(*tensors: torch.Tensor) -> Calls:
    """What a step on these tensors calls."""
    return DIRECT if deepseek_ops.runs_reference(*tensors) else PUBLIC
