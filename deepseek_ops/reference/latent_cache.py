"""The paged latent cache: one line per token, [latent | k_pe], in bf16 or fp32 or the FP8 token format.

FP8 token (656 bytes at 512/64, without padding): Dc bytes of e4m3, then ceil(Dc / 128) fp32 scales, powers of
two, one for each 128 latent columns, then Dr bf16 of rotated k_pe. A power of two costs nothing: the latent's
value e4m3 * scale is exact in bf16, so what a kernel multiplies is what is written here.
"""

from __future__ import annotations

import torch

from .._checks import E4M3, ceil_div, require
from .quantize import decode_e4m3, dequantize_rows, quantize_1x128

FEW_SLOTS = 64  # up to here Python finds their range faster: decoding


def token_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one FP8 token."""
    return latent_dim + 4 * ceil_div(latent_dim, 128) + 2 * rope_dim


def encode_tokens(latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """latent [T, Dc], k_pe [T, Dr] -> uint8 [T, token bytes]."""
    q, scale = quantize_1x128(latent.float(), True, False)
    parts = (q, scale[:, : latent.shape[0]].t(), k_pe.to(torch.bfloat16))
    return torch.cat([_reinterpret(part, torch.uint8) for part in parts], dim=1)


def _reinterpret(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of each row as elements of `dtype`; a copy, because a wider element needs aligned memory."""
    columns = rows.shape[1] * rows.dtype.itemsize // dtype.itemsize
    packed = rows.clone(memory_format=torch.contiguous_format).flatten()
    return packed.view(dtype).view(rows.shape[0], columns)


def decode_tokens(tokens: torch.Tensor, latent_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [T, token bytes] -> [T, Dc + Dr]."""
    split = latent_dim + 4 * ceil_div(latent_dim, 128)
    parts = tokens.tensor_split((latent_dim, split), dim=1)
    kinds = (E4M3, torch.float32, torch.bfloat16)
    latent, scales, k_pe = (_reinterpret(*pair) for pair in zip(parts, kinds, strict=True))
    if scales.shape[1] == 1:
        values = decode_e4m3(latent).mul_(scales)
    else:
        values = dequantize_rows(latent, scales, torch.float32)
    return torch.cat((values.to(dtype), k_pe.to(dtype)), dim=1)


def read_tokens(
    cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    latent_dim: int,
    dtype: torch.dtype,
    shortest: int = 0,
    longest: int | None = None,
) -> torch.Tensor:
    """Tokens of n requests with P pages each, int [n, P]: [n, longest, Dc + Dr] in `dtype`; default P * page size.

    lengths: int64 [n, 1, 1], none below `shortest`; what lies past a request's length is read as zeros, whatever it
    holds.
    """
    n, page = pages.shape[0], cache.shape[1]
    tokens = cache.index_select(0, pages.flatten()).view(n, pages.shape[1] * page, cache.shape[2])
    tokens = tokens[:, :longest]
    if shortest < tokens.shape[1]:
        past = torch.arange(shortest, tokens.shape[1], device=cache.device)[:, None] >= lengths
        tokens[:, shortest:].masked_fill_(past, 0)
    if cache.dtype == torch.uint8:
        return decode_tokens(tokens.flatten(0, 1), latent_dim, dtype).view(*tokens.shape[:2], -1)
    return tokens.to(dtype)


def cache_write_(
    cache: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write token t to slot slot_mapping[t] = page * page size + position; see `attention.cache_write_`."""
    slots = cache.shape[0] * cache.shape[1]
    if slot_mapping.numel():
        few = slot_mapping.numel() <= FEW_SLOTS
        values = slot_mapping.tolist() if few else [int(x) for x in slot_mapping.aminmax()]
        low, high = min(values), max(values)
        require(low >= -1 and high < slots, "slot_mapping", f"must be in [-1, {slots})", f"{low} .. {high}")
        if low < 0:
            keep = slot_mapping.ge(0).nonzero().squeeze(1)
            latent, k_pe, slot_mapping = (t.index_select(0, keep) for t in (latent, k_pe, slot_mapping))
    if cache.dtype == torch.uint8:
        tokens = encode_tokens(latent, k_pe)
    else:
        tokens = torch.cat((latent.to(cache.dtype), k_pe.to(cache.dtype)), dim=1)
    if not slot_mapping.numel():
        return
    if cache.is_contiguous():
        cache.flatten(0, 1).index_copy_(0, slot_mapping, tokens)
    else:
        page = torch.div(slot_mapping, cache.shape[1], rounding_mode="floor")
        cache[page, slot_mapping - page * cache.shape[1]] = tokens
