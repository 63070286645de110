"""Multi-head latent attention: training over packed documents, absorbed decode over a paged latent cache.

Report section 2.1.1 (MLA), 3.4 (inference). The training form takes the up-projected per-head keys and values
and the one k_pe that all heads share; the decode form works on the cached latent itself (W_UK absorbed into the
query, W_UV applied to the output). Both use the same softmax scale, (nope + rope)^-0.5 times YaRN's correction:
see `rope.softmax_scale`. lse is the natural logarithm of the sum of exp(scores), -inf for a row without keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_range, check_tensor, fail, require
from ._registry import declare
from .reference import attention as reference
from .reference import latent_cache

__all__ = [
    "cache_token_bytes",
    "cache_write_",
    "merge_lse",
    "mla_attention",
    "mla_attention_backward",
    "mla_decode",
]

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_attention(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), _lse_like(q)


def _fake_attention_backward(
    dout: Tensor, q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k_nope, k_pe, v))


def _save_attention(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softmax_scale, ctx.causal = inputs
    q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k = tensors
    ctx.save_for_backward(q, k_nope, k_pe, v, *outputs, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(outputs[1])


def _backward_attention(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _mla_attention_backward(dout, *ctx.saved_tensors, ctx.softmax_scale, ctx.causal)
    return (*grads, None, None, None, None)


_mla_attention_backward = declare(
    "mla_attention_backward(Tensor dout, Tensor q, Tensor k_nope, Tensor k_pe, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, bool causal) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.mla_attention_backward,
    fake=_fake_attention_backward,
)

_mla_attention = declare(
    "mla_attention(Tensor q, Tensor k_nope, Tensor k_pe, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "float softmax_scale, bool causal) -> (Tensor, Tensor)",
    reference=reference.mla_attention,
    fake=_fake_attention,
    save=_save_attention,
    backward=_backward_attention,
)


def _fake_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    cu: Tensor,
    scale: float,
    latent_dim: int,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], latent_dim), _lse_like(q)


_mla_decode = declare(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor cache_seqlens, Tensor cu_seqlens_q, "
    "float softmax_scale, int latent_dim, bool batch_invariant) -> (Tensor, Tensor)",
    reference=reference.mla_decode,
    fake=_fake_decode,
)

_cache_write_ = declare(
    "cache_write_(Tensor(a!) cache, Tensor latent, Tensor k_pe, Tensor slot_mapping) -> ()",
    reference=latent_cache.cache_write_,
    fake=lambda cache, latent, k_pe, slot_mapping: None,
)

_merge_lse = declare(
    "merge_lse(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    reference=reference.merge_lse,
    fake=lambda out_a, lse_a, out_b, lse_b: (
        torch.empty_like(out_a, memory_format=torch.contiguous_format),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    ),
)


def _check_bounds(name: str, bounds: Tensor, device: torch.device, like: Tensor | None = None) -> None:
    check_tensor(name, bounds, dtype=torch.int32, ndim=1, device=device)
    if like is None:
        require(bounds.shape[0] >= 1, name, "must have n + 1 entries for n documents", "0 entries")
    else:
        check_tensor(name, bounds, shape=like.shape)


def mla_attention(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention inside each of n packed documents: softmax(softmax_scale q K^T) v with K = [k_nope | k_pe].

    q: [Tq, H, Dn + Dr], nope columns first. k_nope: [Tk, H, Dn]. k_pe: [Tk, Dr], rotated, shared by the heads.
    v: [Tk, H, Dv]. All of one dtype: bf16, fp32 or fp64 (V3: Dn 128, Dr 64, Dv 128; any sizes work).
    cu_seqlens_q, cu_seqlens_k: int32 [n + 1] on the device, rising from 0; document i owns the rows
    cu_seqlens[i] .. cu_seqlens[i+1]; without cu_seqlens_k, keys divide as queries. Documents may be empty; rows past the last one are padding and never read.
    causal: the last query of a document sees all its keys, the one before all but the last, and so on
    (bottom right), which is the usual triangle when the lengths are equal.

    Returns out [Tq, H, Dv] in q's dtype and lse [Tq, H] in fp32 (fp64 for fp64). A row without keys, and a
    padding row, gives out 0, lse -inf and zero gradients. Nothing crosses a document's border, NaN included.
    Differentiable in q, k_nope, k_pe and v, not through lse. Deterministic. Raises `ArgumentError`.
    """
    _check_attention(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return _mla_attention(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def mla_attention_backward(
    dout: Tensor,
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk_nope, dk_pe, dv) of `mla_attention` for dout [Tq, H, Dv], which gave out and lse.

    For those who write their own autograd around it, as `deepseek_ops.nn.attention_linear` does: out may be what a
    smaller format gives back. Not differentiable. Raises `ArgumentError`.
    """
    _check_attention(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    shape = (*q.shape[:2], v.shape[2])
    check_tensor("dout", dout, dtype=q.dtype, shape=shape, device=q.device)
    check_tensor("out", out, dtype=q.dtype, shape=shape, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_tensor("lse", lse, dtype=wide, shape=q.shape[:2], device=q.device)
    return _mla_attention_backward(
        dout, q, k_nope, k_pe, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    )


def _check_attention(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
) -> None:
    check_tensor("q", q, dtype=_FLOATS, ndim=3)
    heads = q.shape[1]
    check_tensor("k_nope", k_nope, dtype=q.dtype, shape=(None, heads, None), device=q.device)
    tokens, nope = k_nope.shape[0], k_nope.shape[2]
    check_tensor("k_pe", k_pe, dtype=q.dtype, shape=(tokens, None), device=q.device)
    columns = nope + k_pe.shape[1]
    rule = f"must have the columns of k_nope and k_pe, {nope} + {k_pe.shape[1]} = {columns}"
    require(q.shape[2] == columns, "q", rule, q.shape[2])
    check_tensor("v", v, dtype=q.dtype, shape=(tokens, heads, None), device=q.device)
    _check_bounds("cu_seqlens_q", cu_seqlens_q, q.device)
    if cu_seqlens_k is None:
        require(tokens == q.shape[0], "cu_seqlens_k", "must be given when q and k_nope differ in rows", None)
    else:
        _check_bounds("cu_seqlens_k", cu_seqlens_k, q.device, like=cu_seqlens_q)
    check_range("softmax_scale", softmax_scale, low=0.0, high=3e38)


def cache_token_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token in the FP8 cache format: Dc e4m3 + ceil(Dc / 128) fp32 scales + Dr bf16 (656 at 512/64)."""
    require(latent_dim > 0, "latent_dim", "must be positive", latent_dim)
    require(rope_dim >= 0, "rope_dim", "must not be negative", rope_dim)
    return latent_cache.token_bytes(latent_dim, rope_dim)


def _check_cache(
    cache: Tensor, latent_dim: int, rope_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """[blocks, page, line]: uint8 lines of the FP8 format, or lines of latent_dim + rope_dim in `dtype`."""
    check_tensor("cache", cache, dtype=(torch.uint8, dtype), ndim=3, device=device)
    line = latent_dim + rope_dim
    if cache.dtype == torch.uint8:
        line = cache_token_bytes(latent_dim, rope_dim)
    check_tensor("cache", cache, shape=(None, None, line))
    if cache.shape[1] == 0:
        fail("cache", "must have pages of at least one token", f"shape {tuple(cache.shape)}")


def cache_write_(cache: Tensor, latent: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
    """Write tokens into the paged latent cache, in place.

    cache: [blocks, page, Dc + Dr] in latent's dtype, or uint8 [blocks, page, cache_token_bytes(Dc, Dr)], which
    stores the latent as e4m3 with power-of-two scales over 128 columns (the quantiser's rule) and k_pe as bf16.
    latent: [T, Dc], the *normalised* latent, bf16 or fp32. k_pe: [T, Dr], *rotated*, the same dtype.
    slot_mapping: int64 [T], block * page + position for each token, all different; -1 skips the token (padding).
    Raises `ArgumentError` and writes nothing if an argument is wrong (slots are verified by the reference only).
    """
    check_tensor("latent", latent, dtype=_FLOATS, ndim=2)
    check_tensor("k_pe", k_pe, dtype=latent.dtype, shape=(latent.shape[0], None), device=latent.device)
    _check_cache(cache, latent.shape[1], k_pe.shape[1], latent.dtype, latent.device)
    check_tensor(
        "slot_mapping", slot_mapping, dtype=torch.int64, shape=latent.shape[:1], device=latent.device
    )
    _cache_write_(cache, latent, k_pe, slot_mapping)


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    softmax_scale: float,
    latent_dim: int,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of B requests with 0 to 8 query tokens each over their cached tokens (report 3.4).

    q: [Tq, H, Dc + Dr], bf16 or fp32: (W_UK^T q_nope | rotated q_pe), any number of heads.
    cache: [blocks, page, Dc + Dr] in q's dtype, or uint8 lines of `cache_token_bytes`; see `cache_write_`.
    block_table: int32 [B, max_blocks]; entries past a request's ceil(cache_seqlens / page) blocks are never read.
    cache_seqlens: int32 [B], cached tokens *including* the query tokens, which must have been written.
    cu_seqlens_q: int32 [B + 1]; among a request's query tokens attention is causal (bottom right).
    softmax_scale: that of the unabsorbed form, `rope.softmax_scale(192)`, never 576^-0.5.
    batch_invariant: a request's result does not depend on the other requests, bit for bit (for reinforcement
    learning, where the trainer must see what the sampler saw); otherwise only up to rounding, and faster.

    Returns out [Tq, H, Dc] (P latent, still to be multiplied by W_UV) in q's dtype, and lse [Tq, H] fp32.
    A request of length 0, and a query token that sees no key, gives out 0 and lse -inf. What lies in pages that
    no request uses, or in a page behind a request's end, has no influence, NaN included. Not differentiable. Raises `ArgumentError`.
    """
    check_tensor("q", q, dtype=_FLOATS, ndim=3)
    rope_dim = q.shape[2] - latent_dim
    if not 0 < latent_dim <= q.shape[2]:
        fail("latent_dim", f"must be in [1, {q.shape[2]}], q's columns", latent_dim)
    _check_cache(cache, latent_dim, rope_dim, q.dtype, q.device)
    check_tensor("block_table", block_table, dtype=torch.int32, ndim=2, device=q.device)
    requests = block_table.shape[0]
    check_tensor("cache_seqlens", cache_seqlens, dtype=torch.int32, shape=(requests,), device=q.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, dtype=torch.int32, shape=(requests + 1,), device=q.device)
    check_range("softmax_scale", softmax_scale, low=0.0, high=3e38)
    return _mla_decode(
        q, cache, block_table, cache_seqlens, cu_seqlens_q, softmax_scale, latent_dim, batch_invariant
    )


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each (chunked prefill).

    out_a, out_b: [..., D], one dtype; lse_a, lse_b: [...], fp32 (fp64 beside an fp64 out), natural logarithm.
    A side whose lse is -inf has no keys and no influence, whatever its out holds; two such sides give out 0,
    lse -inf. Computed in lse's dtype, one rounding to out's. Not differentiable. Raises `ArgumentError`.
    """
    check_tensor("out_a", out_a, dtype=_FLOATS)
    require(out_a.ndim >= 1, "out_a", "must have at least 1 dimension", "a scalar")
    wide = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    check_tensor("out_b", out_b, dtype=out_a.dtype, shape=out_a.shape, device=out_a.device)
    check_tensor("lse_a", lse_a, dtype=wide, shape=out_a.shape[:-1], device=out_a.device)
    check_tensor("lse_b", lse_b, dtype=wide, shape=out_a.shape[:-1], device=out_a.device)
    return _merge_lse(out_a, lse_a, out_b, lse_b)
