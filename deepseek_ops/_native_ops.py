"""From the functions of a native module to the kernels of ops.

A native function takes an op's arguments in their order, then one tensor for each output (csrc/bindings/kernels.h).
What stands around it is the same for every op: outputs are allocated as the op's `fake` says, and tensors that the op
writes in place get a new version, so that autograd notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import _emulation, _registry


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

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if take is not None:
            args = tuple(take(x) if i in copied else x for i, x in enumerate(args))
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        if outputs is None:
            native(*args)
        elif isinstance(outputs, torch.Tensor):
            native(*args, outputs)
        else:
            native(*args, *outputs)
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
}


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
