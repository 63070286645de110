"""From the functions of a native module to the kernels of ops.

A native function takes an op's arguments in their order, then one tensor for each output (csrc/bindings/kernels.h), then
the workspace of the few ops that need one (`_WORKSPACE`). What stands around it is the same for every op: outputs are
allocated as the op's `fake` says, and tensors that the op writes in place get a new version, so that autograd notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import _emulation, _registry
from .reference.modelled.loss import classes_of_chunk


def attach(target: str, module: Any) -> None:
    """Give every declared op that `module` has a function for its kernel of `target`."""
    for name in module.build_info()["kernels"]:
        op = _registry.OPS.get(name)
        if op is not None:
            op.kernels[target] = kernel(op, target, module)


def kernel(op: _registry.Op, target: str, module: Any) -> Callable[..., Any]:
    """The op as `target` runs it: a function of the op's arguments, by position or by name."""
    native = getattr(module, op.name)
    schema = op.raw._schema
    names = [argument.name for argument in schema.arguments]
    mutated = [
        i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    prepare = None if target == "cuda" else functools.partial(_emulation.prepare, target, module)
    fake = op.fake

    copied, take = _FOR_TMA.get(op.name, ((), None))
    workspace = _WORKSPACE.get(op.name, lambda *args: ())

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if take is not None:
            args = tuple(take(x) if i in copied else x for i, x in enumerate(args))
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        if outputs is None:
            native(*args, *workspace(*args))
        elif isinstance(outputs, torch.Tensor):
            native(*args, outputs, *workspace(*args))
        else:
            native(*args, *outputs, *workspace(*args))
        for i in mutated:
            if isinstance(args[i], torch.Tensor) and not args[i].is_inference():  # those have no version
                increment_version(args[i])
        return outputs

    return run


def _rows_for_tma(x: torch.Tensor) -> torch.Tensor:
    """Rows at multiples of 16 bytes. The quantisers return dense rows, so that a K that is no multiple of 16 needs a
    copy here; the shapes of DeepSeek-V3 never do."""
    size = x.element_size()
    if x.ndim != 2 or x.stride(1) != 1 or x.stride(0) * size % 16 == 0 or x.numel() == 0:
        return x
    columns = x.shape[1]
    room = x.new_empty(x.shape[0], -(-columns * size // 16) * 16 // size)
    room[:, :columns].copy_(x)
    return room[:, :columns]


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


# Ops whose kernels read operands by TMA: which arguments, and what makes them fit.
_BF16_GEMM = ("gemm", "gemm_grouped", "gemm_masked", "wgrad", "wgrad_grouped", "wgrad_masked")
_FOR_TMA: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "fp8_gemm": ((0, 2), _rows_for_tma),
    "fp8_gemm_": ((0, 2), _rows_for_tma),
    **{name + end: ((0, 1), _matrices_for_tma) for name in _BF16_GEMM for end in ("", "_")},
    "linear_cross_entropy": ((0, 1), _matrices_for_tma),
    "linear_cross_entropy_tokens": ((0, 1), _matrices_for_tma),
    "linear_cross_entropy_tokens_backward": ((1, 2), _matrices_for_tma),
}


def _cross_entropy_workspace(
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


# Tensors that a kernel writes and nobody reads afterwards: op -> a function of its arguments. Allocated here because
# kernels allocate nothing; the caching allocator gives the memory back to the next op on the stream.
_WORKSPACE: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "linear_cross_entropy": lambda h, weight, labels, *options: _with_token_loss(
        h, _cross_entropy_workspace(h, weight, *options)
    ),
    "linear_cross_entropy_tokens": lambda h, weight, labels, chunk: _cross_entropy_workspace(
        h, weight, chunk, False, False
    ),
    "linear_cross_entropy_tokens_backward": lambda dloss, h, weight, labels, *options: _with_token_loss(
        h, _cross_entropy_workspace(h, weight, *options)
    ),
}


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
