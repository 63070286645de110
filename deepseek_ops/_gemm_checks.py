"""Argument rules of the GEMM family, each written once."""

from __future__ import annotations

import torch

from ._checks import E4M3, ceil_div, check_choice, check_tensor, fail, require, round_up

ACCUMULATIONS = ("exact", "hopper", "hopper_unpromoted")
OPERANDS = (torch.bfloat16, torch.float32, torch.float64)
# kFp8GemmTiles of csrc/gemm/fp8_gemm.h: rows and columns of the tiles that fp8_gemm has kernels for.
FP8_GEMM_TILES = (
    (256, 128), (128, 256), (128, 192), (128, 160), (128, 128), (128, 112), (128, 96), (64, 128), (64, 256),
)  # fmt: skip
# kFp8WgradTiles of csrc/gemm/fp8_wgrad.h.
FP8_WGRAD_TILES = ((128, 192), (128, 160), (128, 128), (64, 128))

# kFp8GroupedTiles: those of them that fp8_gemm_grouped and fp8_gemm_masked have kernels for.
FP8_GROUPED_TILES = ((128, 256), (128, 192), (128, 160), (128, 128), (64, 128), (64, 256))

# kBf16GemmTiles of csrc/gemm/bf16_gemm.h, the same for gemm and wgrad and their grouped forms.
BF16_GEMM_TILES = ((256, 128), (128, 256), (128, 192), (128, 128), (64, 256), (64, 128))


def check_fp8(argument: str, q: object, ndim: int, device: torch.device | None = None) -> torch.Tensor:
    """One e4m3 operand."""
    return check_tensor(argument, q, dtype=E4M3, ndim=ndim, device=device)


def check_same_size(argument: str, tensor: torch.Tensor, dim: int, size: int, of: str) -> None:
    """One dimension must equal another operand's."""
    require(
        tensor.shape[dim] == size, argument, f"dimension {dim} must be {size} as {of}", tuple(tensor.shape)
    )


def check_row_scale(argument: str, scale: object, q: torch.Tensor) -> None:
    """GEMM-ready 1x128 scales of q [..., M, K]: fp32 [..., ceil(K/128), M padded to 4]."""
    *lead, m, k = q.shape
    shape = (*lead, ceil_div(k, 128), round_up(m, 4))
    check_tensor(argument, scale, dtype=torch.float32, shape=shape, device=q.device)


def check_block_scale(argument: str, scale: object, q: torch.Tensor) -> None:
    """128x128 scales of q [..., N, K]: fp32 [..., ceil(N/128), ceil(K/128)]."""
    *lead, n, k = q.shape
    shape = (*lead, ceil_div(n, 128), ceil_div(k, 128))
    check_tensor(argument, scale, dtype=torch.float32, shape=shape, device=q.device)


def check_index(argument: str, index: object, size: int | None, device: torch.device) -> torch.Tensor:
    """int32 vector on the operands' device: offsets [G+1] or row counts [G]."""
    return check_tensor(argument, index, dtype=torch.int32, shape=(size,), device=device)


def check_group_ends(offsets: object, device: torch.device) -> int:
    """Offsets where no operand tells the number of groups; returns it."""
    tensor = check_index("offsets", offsets, None, device)
    require(tensor.shape[0] >= 1, "offsets", "must hold at least one entry (G + 1)", tuple(tensor.shape))
    return tensor.shape[0] - 1


def check_pair(a: object, b: object, a_ndim: int, b_ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two operands of one dtype out of bf16, fp32, fp64, on one device."""
    first = check_tensor("a", a, dtype=OPERANDS, ndim=a_ndim)
    return first, check_tensor("b", b, dtype=first.dtype, ndim=b_ndim, device=first.device)


def check_output(
    out: object,
    out_dtype: torch.dtype | None,
    default: torch.dtype,
    shape: tuple[int, ...],
    a: torch.Tensor,
    accumulate: bool = False,
) -> torch.dtype:
    """The output's dtype: that of `out` if given, else `out_dtype`, else the default of the function.

    bf16 or fp32, and fp64 for fp64 operands (which allow nothing else).
    """
    require(out is not None or not accumulate, "accumulate", "needs out to add to", "out=None")
    allowed = (torch.float64,) if a.dtype == torch.float64 else (torch.bfloat16, torch.float32)
    if out_dtype is not None:
        check_choice("out_dtype", out_dtype, allowed)
    if out is None:
        return default if out_dtype is None else out_dtype
    tensor = check_tensor("out", out, dtype=allowed, shape=shape, device=a.device)
    require(
        out_dtype in (None, tensor.dtype), "out_dtype", f"must be None or out's {tensor.dtype}", out_dtype
    )
    return tensor.dtype


def check_no_gradient(out: object, a: torch.Tensor, b: torch.Tensor) -> None:
    """Writing into `out` cannot be differentiated."""
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    rule = "must be None while gradients of a or b are recorded (detach them, or use torch.no_grad())"
    require(out is None or not recorded, "out", rule, "a tensor")


def check_num_sms(num_sms: object) -> None:
    """How many multiprocessors a kernel may use."""
    valid = isinstance(num_sms, int) and not isinstance(num_sms, bool) and 0 <= num_sms < 2**31
    require(valid, "num_sms", "must be an integer in 0..2^31-1 (0: all)", repr(num_sms))


def check_tile(tile: object, tiles: tuple[tuple[int, int], ...] = FP8_GEMM_TILES) -> tuple[int, int]:
    """Rows and columns of a tile that has a kernel; zeros for None."""
    if tile is None:
        return 0, 0
    if isinstance(tile, tuple) and tile in tiles:
        return tile
    legal = ", ".join(map(str, tiles))
    fail("tile", f"must be None or one of {legal}", repr(tile))


def check_knobs(num_sms: object, tile: object) -> tuple[int, int, int]:
    """The knobs of bf16 GEMM, as the ops take them."""
    check_num_sms(num_sms)
    return int(num_sms), *check_tile(tile, BF16_GEMM_TILES)  # type: ignore[call-overload]


def check_accumulation(accumulation: object) -> None:
    check_choice("accumulation", accumulation, ACCUMULATIONS)


# --- decoding --------------------------------------------------------------------------------------------------

DECODE_ROWS = 64  # kMaxTokens of csrc/gemm/fp8_decode.cuh: what one tile multiplies with the weights
DECODE_GROUPS = 512  # kMaxGroups
SPLITS = (1, 2, 4, 8)


def check_decode_rows(a: torch.Tensor, other: str) -> None:
    """At most 64 rows, in each group of a batch."""
    require(
        a.shape[-2] <= DECODE_ROWS,
        "a",
        f"must have at most {DECODE_ROWS} rows ({other} takes any number)",
        a.shape[-2],
    )


def check_decode_groups(a: torch.Tensor) -> None:
    """A block keeps the list of groups with rows in shared memory."""
    require(a.shape[0] <= DECODE_GROUPS, "a", f"must have at most {DECODE_GROUPS} matrices", a.shape[0])


def check_split_k(split_k: object, n: int, k: int) -> int:
    """How many ranges K is divided into; None: what `choose_split_k` says."""
    if split_k is None:
        return choose_split_k(n, k)
    valid = isinstance(split_k, int) and not isinstance(split_k, bool) and split_k in SPLITS
    require(valid, "split_k", "must be None, 1, 2, 4 or 8", repr(split_k))
    assert isinstance(split_k, int)
    return split_k


def choose_split_k(n: int, k: int) -> int:
    """The largest of 1, 2, 4, 8 that gives at most 128 blocks of 128 weight rows and at least 4 slices of 128 to each.

    Of N and K alone, with constants that stand for no machine in particular: the bits of a result follow from its
    operands. 128 blocks keep the multiprocessors of any Hopper busy in one wave (an H100 has 132).
    """
    tiles, slices = ceil_div(n, 128), ceil_div(k, 128)
    legal = [split for split in SPLITS if tiles * split <= 128 and slices >= 4 * split]
    return max(legal, default=1)
