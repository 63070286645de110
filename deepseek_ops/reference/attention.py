"""MLA attention over packed documents: the meaning, and what the CPU trains with.

Scores, softmax and accumulation are fp32 (fp64 for fp64 inputs); P and dS are rounded to bf16 before they
meet the next matrix product when the inputs are bf16, as the tensor cores need it.

Speed notes (two Zen cores, 16 documents x 256 tokens, 4 heads, 48/32): the softmax runs in base two because
torch's exp2 is 3 to 10 times faster than its exp; the copy of K = [k_nope | k_pe] costs 0.1 ms and is cheaper
than a second product q_pe k_pe^T; row blocks skip 3/8 of the scores above the diagonal.
"""

from __future__ import annotations

import itertools
import math

import torch

from .._checks import ceil_div, fail
from .documents import Rows, groups
from .latent_cache import read_tokens

ROWS = 64  # query rows of one block
SCORES = 1 << 18  # scores of one block: 1 MiB in fp32, which a second-level cache holds
LOG2_E = math.log2(math.e)
MAX_QUERY_TOKENS = 8  # of one decode request


def mla_attention(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward; see `deepseek_ops.attention.mla_attention`."""
    heads = q.shape[1]
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=_wide(q.dtype), device=q.device)
    for group in groups(cu_seqlens_q, cu_seqlens_k, q.shape[0], k_nope.shape[0], causal) if heads else ():
        queries = _by_head(group.queries, q)
        k = _keys(group.keys, k_nope, k_pe)
        values = _by_head(group.keys, v, v.dtype)
        o = torch.empty(*queries.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse2 = torch.empty(queries.shape[:2], dtype=queries.dtype, device=q.device)
        for block in group.blocks(heads, queries.dtype, rows=ROWS, budget=SCORES):
            at = (block.pairs, block.rows)
            scores = _scaled_bmm(queries[at], k[block.pairs, : block.keys].mT, softmax_scale * LOG2_E)
            block.mask_(scores)
            top = scores.amax(-1, keepdim=True)
            p = scores.sub_(top).exp2_()
            total = p.sum(-1, keepdim=True)
            p = p.mul_(total.reciprocal()).to(q.dtype)
            o[at] = torch.bmm(p, values[block.pairs, : block.keys])
            lse2[at] = total.log2_().add_(top).squeeze(-1)
        o, lse2 = _documents(o, heads), _documents(lse2, heads).mul_(1 / LOG2_E)
        without = group.rows_without_keys()
        if without is not None:
            o.masked_fill_(without[..., None, None], 0)
            lse2.masked_fill_(without[..., None], -torch.inf)
        group.queries.scatter_(out, o)
        group.queries.scatter_(lse, lse2)
    return out, lse


def mla_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k_nope, k_pe and v from dout, with P recomputed from lse.

    With D = rowsum(dout * out): dS = scale P * (dout v^T - D); dq = dS k; dk = dS^T q; dv = P^T dout;
    dk_pe is the sum of dk's rope columns over heads, in fp32.
    """
    heads, nope = q.shape[1], k_nope.shape[2]
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k_nope, k_pe, v)]
    dq, dk_nope, dk_pe, dv = grads
    for group in groups(cu_seqlens_q, cu_seqlens_k, q.shape[0], k_nope.shape[0], causal) if heads else ():
        queries = _by_head(group.queries, q)
        k = _keys(group.keys, k_nope, k_pe)
        k_low = k.to(q.dtype)
        values = _by_head(group.keys, v)
        do = _by_head(group.queries, dout)
        lse2 = _by_head(group.queries, lse.unsqueeze(-1)).mul_(LOG2_E)
        without = group.rows_without_keys()
        if without is not None:  # they act on nothing: S = 0, dP = 0, and a finite P
            for rows in (queries, do, lse2):
                _documents(rows, heads).masked_fill_(without[..., None, None], 0)
        delta = _by_head(group.queries, out).mul_(do).sum(-1, keepdim=True).mul_(softmax_scale)
        dq_heads = torch.empty_like(queries, dtype=q.dtype)
        dk, dvalues = torch.empty_like(k), torch.empty_like(values)
        for block in group.blocks(heads, queries.dtype, rows=ROWS, budget=SCORES):
            at, keys = (block.pairs, block.rows), (block.pairs, slice(block.keys))
            scores = _scaled_bmm(queries[at], k[keys].mT, softmax_scale * LOG2_E)
            p = block.mask_(scores).sub_(lse2[at]).exp2_()
            ds = _scaled_bmm(do[at], values[keys].mT, softmax_scale).sub_(delta[at]).mul_(p).to(q.dtype)
            dq_heads[at] = torch.bmm(ds, k_low[keys])
            ds, p = ds.to(k.dtype), p.to(q.dtype).to(k.dtype)
            if block.first_visit:
                torch.bmm(p.mT, do[at], out=dvalues[block.pairs])
                torch.bmm(ds.mT, queries[at], out=dk[block.pairs])
            else:
                dvalues[keys].add_(torch.bmm(p.mT, do[at]))
                dk[keys].add_(torch.bmm(ds.mT, queries[at]))
        dq_heads, dk, dvalues = (_documents(t, heads) for t in (dq_heads, dk, dvalues))
        if without is not None:
            dq_heads.masked_fill_(without[..., None, None], 0)
        group.queries.scatter_(dq, dq_heads)
        group.keys.scatter_(dk_nope, dk[..., :nope])
        group.keys.scatter_(dk_pe, dk[..., nope:].sum(2))
        group.keys.scatter_(dv, dvalues)
    return dq, dk_nope, dk_pe, dv


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a b, the factor inside the matrix product where it is free."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _by_head(rows: Rows, packed: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[T, H, D] -> a fresh [documents * H, longest, D] in `dtype`, by default the one computed in."""
    x = rows.gather(packed).transpose(1, 2)
    fresh = torch.empty(x.shape, dtype=dtype or _wide(x.dtype), device=x.device)
    return fresh.copy_(x).flatten(0, 1)


def _documents(by_head: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back: a view [documents, longest, H, ...] of [documents * H, longest, ...]."""
    return by_head.unflatten(0, (-1, heads)).transpose(1, 2)


def _keys(rows: Rows, k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """K = [k_nope | k_pe, the same for every head], [documents * H, longest, Dn + Dr] in fp32."""
    nope = rows.gather(k_nope).transpose(1, 2)
    k = nope.new_empty(*nope.shape[:3], nope.shape[3] + k_pe.shape[1], dtype=_wide(k_nope.dtype))
    k[..., : nope.shape[3]] = nope
    k[..., nope.shape[3] :] = rows.gather(k_pe)[:, None]
    return k.flatten(0, 1)


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    latent_dim: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed decode; see `deepseek_ops.attention.mla_decode`.

    Requests with as many query tokens and as many pages are one batched product; with `batch_invariant` every
    request is a batch of its own, because a product's last bits change with the number of matrices in it.
    """
    bounds, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    n, heads, page = len(lengths), q.shape[1], cache.shape[1]
    counts = [b - a for a, b in itertools.pairwise(bounds)]
    fewest, most = min(counts, default=0), max(counts, default=0)
    if bounds[0] != 0 or bounds[-1] > q.shape[0] or fewest < 0 or most > MAX_QUERY_TOKENS:
        rule = f"must rise from 0 to at most {q.shape[0]} rows in steps of at most {MAX_QUERY_TOKENS}"
        fail("cu_seqlens_q", rule, bounds)
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest < 0 or longest > block_table.shape[1] * page:
        rule = f"must be in [0, {block_table.shape[1] * page}], what block_table can address"
        fail("cache_seqlens", rule, lengths)

    pages = ceil_div(longest, page)
    alike = fewest == most and ceil_div(shortest, page) == pages and bounds[-1] == q.shape[0]
    if alike and n and most and pages and heads and (n == 1 or not batch_invariant):
        # Nothing to sort into groups: the usual batch of decoding.
        rows, table = q.view(n, most, *q.shape[1:]), block_table[:, :pages]
        out, lse = _decode(rows, cache, table, lengths, cache_seqlens, softmax_scale, latent_dim)
        return out.flatten(0, 1), lse.flatten(0, 1)

    out = q.new_zeros(*q.shape[:2], latent_dim)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=_wide(q.dtype), device=q.device)
    groups: dict[tuple[int, ...], list[int]] = {}
    for request, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count and length and heads:
            pages = ceil_div(length, page)
            groups.setdefault((count, pages, request if batch_invariant else -1), []).append(request)
    for (count, pages, _), requests in groups.items():
        index = torch.tensor(requests, device=q.device)
        at = cu_seqlens_q.index_select(0, index).long()[:, None] + torch.arange(count, device=q.device)
        out[at], lse[at] = _decode(
            q[at],
            cache,
            block_table.index_select(0, index)[:, :pages],
            [lengths[request] for request in requests],
            cache_seqlens.index_select(0, index),
            softmax_scale,
            latent_dim,
        )
    return out, lse


def _decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: list[int],
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    latent_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """n requests with as many queries and as many pages, q [n, count, H, Dc + Dr]: out [n, count, H, Dc], lse.

    Scores end at the longest request, so that requests of one length with one query each need no mask at all.
    """
    n, count, heads, _ = q.shape
    wide, shortest, longest = _wide(q.dtype), min(lengths), max(lengths)
    size = cache_seqlens.long()[:, None, None]
    keys = read_tokens(cache, pages, size, latent_dim, wide, shortest, longest)
    rows = q.to(wide).mul(softmax_scale * LOG2_E).reshape(n, count * heads, -1)
    scores = torch.bmm(rows, keys.mT)
    seen_by_all = max(shortest - count + 1, 0)
    if seen_by_all < longest:
        # Query token i of `count` sees all but the last count - 1 - i tokens.
        visible = size - torch.arange(count - 1, -1, -1, device=q.device)[:, None]
        hidden = torch.arange(seen_by_all, longest, device=q.device) >= visible
        rest = scores.view(n, count, heads, longest)[..., seen_by_all:]
        rest.masked_fill_(hidden[:, :, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if shortest >= count:
        p = scores.sub_(top).exp2_()
        total = p.sum(-1, keepdim=True)
        p.div_(total)
    else:  # a token without keys: P is all 0, out is 0, and lse is -inf
        p = scores.sub_(top.clamp_min(torch.finfo(wide).min)).exp2_()
        total = p.sum(-1, keepdim=True)
        p.div_(total.masked_fill(total == 0, 1))
    out = torch.bmm(p.to(q.dtype).to(wide), keys[..., :latent_dim]).to(q.dtype)
    lse = total.log2_().add_(top).mul_(1 / LOG2_E)
    return out.view(n, count, heads, latent_dim), lse.view(n, count, heads)


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge of attention over two disjoint key sets; see `deepseek_ops.attention.merge_lse`."""
    wide = lse_a.dtype
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    parts = [
        torch.where(weight.unsqueeze(-1) == 0, 0, out.to(wide) * (weight / total).unsqueeze(-1))
        for out, weight in ((out_a, weight_a), (out_b, weight_b))
    ]
    return (parts[0] + parts[1]).to(out_a.dtype), top + total.log()
