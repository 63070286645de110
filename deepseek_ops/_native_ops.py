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

    padded = _PADDED_ROWS.get(op.name, ())
    by_rows = _BY_ROWS.get(op.name, ())
    workspace = _WORKSPACES.get(op.name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if padded:
            args = tuple(_rows_for_tma(x) if i in padded else x for i, x in enumerate(args))
        if by_rows:
            args = tuple(_rows_of_one_matrix(x) if i in by_rows else x for i, x in enumerate(args))
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        if workspace is not None:
            native(*args, *outputs, *workspace(*args))
        elif outputs is None:
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


# Operands that the kernels read by TMA: rows at multiples of 16 bytes. The quantisers return dense rows, so that a K
# that is no multiple of 16 needs a copy here; the shapes of DeepSeek-V3 never do.
_PADDED_ROWS = {"fp8_gemm": (0, 2), "fp8_gemm_": (0, 2)}


def _rows_for_tma(x: torch.Tensor) -> torch.Tensor:
    size = x.element_size()
    if x.ndim != 2 or x.stride(1) != 1 or x.stride(0) * size % 16 == 0 or x.numel() == 0:
        return x
    columns = x.shape[1]
    room = x.new_empty(x.shape[0], -(-columns * size // 16) * 16 // size)
    room[:, :columns].copy_(x)
    return room[:, :columns]


# Tensors [..., columns] that kernels read row by row: any strides, but one from row to row.
_BY_ROWS = {
    "rms_norm": (0,),
    "rms_norm_residual": (0, 1),
    "rms_norm_backward": (0, 1, 4),
}


def _rows_of_one_matrix(x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None or x.ndim < 3:
        return x
    rows = 1
    stride = None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1:
            stride = step if stride is None else stride
            if step != rows * stride:
                return x.contiguous()
            rows *= size
    return x


# Tensors that only the kernels need, after the outputs.
def _norm_backward_workspace(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor]:
    """fp64 sums over the rows that one block of the first stage takes: as many as blocks that run at once on an H200."""
    width = -(-x.shape[-1] // 512) * 512
    rows = x.numel() // x.shape[-1]
    parts = min(-(-rows // 8), 132 * max(1, min(8, 7168 // width)))
    return (torch.empty(parts, width, dtype=torch.float64, device=x.device),)


_WORKSPACES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "rms_norm_backward": _norm_backward_workspace,
}


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
