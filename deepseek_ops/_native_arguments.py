"""What single ops need around their native function: operands in a form that the kernel reads, and workspaces.

`takes`: whether the kernels have the dtypes of a call; where the user has not chosen a backend, the reference serves the others.
OPERANDS: op -> {position of an argument: function}, which returns the operand as it is or a copy (copied back where the op
writes it); what a training run of DeepSeek-V3 keeps never needs one. WORKSPACES: op -> function of the op's arguments, which returns memory that only the kernel needs between
its launches: uninitialised, dropped after the call; a caching allocator hands it out again only to what runs later on the same
stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .reference.modelled.loss import classes_of_chunk


def _rows_for_tma(x: torch.Tensor) -> torch.Tensor:
    """Rows at multiples of 16 bytes. The quantisers return dense rows, so that a K that is no multiple of 16 needs a
    copy here; the shapes of DeepSeek-V3 never do."""
    size = x.element_size()
    if x.ndim < 2 or x.stride(-1) != 1 or x.numel() == 0:
        return x
    if all(stride * size % 16 == 0 for stride in x.stride()[:-1]):
        return x
    columns = x.shape[-1]
    room = x.new_empty(*x.shape[:-1], -(-columns * size // 16) * 16 // size)
    room[..., :columns].copy_(x)
    return room[..., :columns]


def _matrices_for_tma(x: torch.Tensor) -> torch.Tensor:
    """Operands of bf16 GEMM: as they are if one of the last two dimensions is contiguous, so a transposed view too, and
    everything else lies at multiples of 16 bytes; otherwise a copy with padded rows, of the dimension that was contiguous
    (of the last one where none was). Expanded and overlapping rows are copied as well."""
    if x.ndim not in (2, 3) or x.dtype != torch.bfloat16 or x.numel() == 0:
        return x  # nothing to read, or refused by the kernel
    (rows, columns), (row_step, column_step) = x.shape[-2:], x.stride()[-2:]
    aligned = x.data_ptr() % 16 == 0 and (x.ndim == 2 or x.shape[0] == 1 or x.stride(0) % 8 == 0)
    by_rows = (columns == 1 or column_step == 1) and (
        rows == 1 or (row_step % 8 == 0 and row_step >= columns)
    )
    by_columns = (rows == 1 or row_step == 1) and (
        columns == 1 or (column_step % 8 == 0 and column_step >= rows)
    )
    if aligned and (by_rows or by_columns):
        return x
    if row_step == 1 and column_step != 1:
        return _padded(x.mT).mT
    return _padded(x)


def _padded(x: torch.Tensor) -> torch.Tensor:
    columns = x.shape[-1]
    room = x.new_empty(*x.shape[:-1], -(-columns // 8) * 8)
    return room[..., :columns].copy_(x)


def _dense(value: Any) -> Any:
    """A tensor, or each of a list, with its elements one after the other; packed E5M6 is read in words, and a view of its
    bytes may start anywhere."""
    if isinstance(value, list | tuple):
        return [_dense(x) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.contiguous()  # itself where it is dense
    return value.clone() if value.dtype == torch.uint8 and value.data_ptr() % 4 else value


def _rows_of_one_matrix(x: torch.Tensor) -> torch.Tensor:
    """[..., columns]: any strides, but one from row to row."""
    rows, stride = 1, None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1:
            stride = step if stride is None else stride
            if step != rows * stride:
                return x.contiguous()
            rows *= size
    return x


def _dense_above_one_dimension(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim < 2 else x.contiguous()


def _aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """A matrix of 16-byte pieces."""
    pieces = x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0
    return x if pieces or x.numel() == 0 else x.clone(memory_format=torch.contiguous_format)


def _with_in_place(names: tuple[str, ...], adapt: dict[int, Callable[[Any], Any]]) -> dict[str, Any]:
    """The same for `name` and `name_`."""
    return {name + end: adapt for name in names for end in ("", "_")}


_FP8_GEMM = (
    "fp8_gemm",
    "fp8_gemm_decode",
    "fp8_gemm_grouped",
    "fp8_gemm_masked",
    "fp8_gemm_masked_decode",
    "fp8_wgrad",
    "fp8_wgrad_grouped",
)
_BF16_GEMM = ("gemm", "gemm_grouped", "gemm_masked", "wgrad", "wgrad_grouped", "wgrad_masked")
# Codes and their scales.
_ENCODED = (
    "dequantize_1x128",
    "dequantize_128x1",
    "dequantize_128x128",
    "requantize_e5m6_128x1",
    "requantize_e5m6_128x1_grouped",
    "unpack_e5m6",
)

# Ops whose first two tensors must be bf16, and ops that serve fp64 too; every other kernel serves what it has but fp64.
_BF16_ALONE = frozenset(
    (
        *(name + end for name in _BF16_GEMM for end in ("", "_")),
        "linear_cross_entropy",
        "linear_cross_entropy_tokens",
        "swiglu_backward_quantize",
        "swiglu_backward_quantize_grouped",
    )
)
_FP64_TOO = frozenset(("clip_grad_norm", "permute"))


def takes(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the kernels of this op serve the dtypes of `args`, in the op's order."""
    if name == "linear_cross_entropy_tokens_backward":
        args = args[1:]  # the gradient of the losses is fp32
    for value in args[:2]:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if name in _BF16_ALONE and tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
                return False
            if tensor.dtype == torch.float64 and name not in _FP64_TOO:
                return False
    return True


OPERANDS: Mapping[str, Mapping[int, Callable[[Any], Any]]] = {
    **_with_in_place(_FP8_GEMM, {0: _rows_for_tma, 2: _rows_for_tma}),
    **_with_in_place(_BF16_GEMM, {0: _matrices_for_tma, 1: _matrices_for_tma}),
    "adamw_": dict.fromkeys(range(5), _dense),
    "adamw_quantize_": dict.fromkeys(range(9), _dense),
    "clip_grad_norm": {0: _dense},
    **{name: {0: _dense, 1: _dense} for name in _ENCODED},
    "linear_cross_entropy": {0: _matrices_for_tma, 1: _matrices_for_tma},
    "linear_cross_entropy_tokens": {0: _matrices_for_tma, 1: _matrices_for_tma},
    "linear_cross_entropy_tokens_backward": {1: _matrices_for_tma, 2: _matrices_for_tma},
    "rms_norm": {0: _rows_of_one_matrix},
    "rms_norm_residual": {0: _rows_of_one_matrix, 1: _rows_of_one_matrix},
    "rms_norm_backward": {
        0: _rows_of_one_matrix,
        1: _rows_of_one_matrix,
        3: torch.Tensor.contiguous,
        4: _rows_of_one_matrix,
    },
    "swiglu": {0: _rows_of_one_matrix, 1: _dense_above_one_dimension},
    "swiglu_backward": {0: _rows_of_one_matrix, 1: _rows_of_one_matrix, 2: _dense_above_one_dimension},
    "swiglu_backward_quantize": {0: _aligned_rows, 1: _aligned_rows},
    "swiglu_backward_quantize_grouped": {0: _aligned_rows, 1: _aligned_rows},
}


def _row_of_slot(slots: torch.Tensor) -> tuple[torch.Tensor]:
    """int32, for each token's choice of an expert the row that it has in the order of experts."""
    return (slots.new_empty(slots.numel(), dtype=torch.int32),)


def _balance_loss(scores: torch.Tensor, _topk_idx: torch.Tensor, cu_seqlens: torch.Tensor, *_: Any) -> Any:
    """Choices per sequence and expert, and one number; normalised scores summed per token."""
    bins = (cu_seqlens.shape[0] - 1) * scores.shape[1]
    return scores.new_empty(bins + 1, dtype=torch.int32), scores.new_empty(scores.shape[0])


def _cross_entropy(
    h: torch.Tensor, weight: torch.Tensor, chunk: int, need_dh: bool, need_dweight: bool
) -> tuple[torch.Tensor, ...]:
    """Logits of a chunk of classes and their gradient, fp32 sums of dh, and three numbers for each token."""
    tokens, stride = h.shape[0], classes_of_chunk(h.shape[0], weight.shape[0], chunk)
    wide, number = torch.float32, h.new_empty(tokens, dtype=torch.float32)
    return (
        h.new_empty((tokens, stride), dtype=wide),
        h.new_empty((tokens, stride) if need_dh or need_dweight else 0, dtype=torch.bfloat16),
        h.new_empty(h.shape if need_dh else 0, dtype=wide),
        number,
        h.new_empty(tokens, dtype=torch.float64),
        torch.empty_like(number),
    )


def _with_token_loss(h: torch.Tensor, workspace: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return *workspace, h.new_empty(h.shape[0], dtype=torch.float32)


def _norm_backward(_dy: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor]:
    """fp64 sums over the rows that one block of the first stage takes: as many as blocks that run at once on an H200."""
    width = -(-x.shape[-1] // 512) * 512
    rows = x.numel() // x.shape[-1]
    parts = min(-(-rows // 8), 132 * max(1, min(8, 7168 // width)))
    return (torch.empty(parts, width, dtype=torch.float64, device=x.device),)


def _row_sums(
    dy: torch.Tensor,
    _gate_up: torch.Tensor,
    _scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor]:
    """fp64 sums of each row over 128 columns."""
    tokens, inner = dy.shape
    return (dy.new_empty((0 if weight is None else inner // 128, tokens), dtype=torch.float64),)


WORKSPACES: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "balance_loss": _balance_loss,
    # Sums of the first stage: optimizer::kNormPartials.
    "clip_grad_norm": lambda grads, max_norm: (grads[0].new_empty(8192, dtype=torch.float64),),
    "linear_cross_entropy": lambda h, weight, labels, *options: _with_token_loss(
        h, _cross_entropy(h, weight, *options)
    ),
    "linear_cross_entropy_tokens": lambda h, weight, labels, chunk: _cross_entropy(
        h, weight, chunk, False, False
    ),
    "linear_cross_entropy_tokens_backward": lambda dloss, h, weight, labels, *options: _with_token_loss(
        h, _cross_entropy(h, weight, *options)
    ),
    "permute": lambda x, topk_idx, *_: _row_of_slot(topk_idx),
    "permute_quantized": lambda q, scale, topk_idx, *_: _row_of_slot(topk_idx),
    "rms_norm_backward": _norm_backward,
    "swiglu_backward_quantize": _row_sums,
    "swiglu_backward_quantize_grouped": _row_sums,
    "unpermute": lambda y, source, *_: _row_of_slot(source),
    "unpermute_backward": lambda dout, y, source, *_: _row_of_slot(source),
}
