"""From the functions of a native module to the kernels of ops.

A native function takes an op's arguments in their order, then one tensor for each output, then its workspaces
(csrc/bindings/kernels.h).
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
    layouts = tuple(_LAYOUTS.get(op.name, {}).items())
    workspaces = _WORKSPACES.get(op.name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if padded:
            args = tuple(_rows_for_tma(x) if i in padded else x for i, x in enumerate(args))
        for i, layout in layouts:
            if args[i] is not None:
                args = (*args[:i], layout(args[i]), *args[i + 1 :])
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        results = () if outputs is None else (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        native(*args, *results, *(workspaces(*args) if workspaces is not None else ()))
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


# The layout that kernels ask of an argument, by its place; what has another one is copied.
_LAYOUTS: dict[str, dict[int, Callable[[torch.Tensor], torch.Tensor]]] = {
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


def _norm_backward_workspace(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor]:
    """fp64 sums over the rows that one block of the first stage takes: as many as blocks that run at once on an H200."""
    width = -(-x.shape[-1] // 512) * 512
    rows = x.numel() // x.shape[-1]
    parts = min(-(-rows // 8), 132 * max(1, min(8, 7168 // width)))
    return (torch.empty(parts, width, dtype=torch.float64, device=x.device),)


def _row_sums_workspace(
    dy: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor]:
    """fp64 sums of each row over 128 columns."""
    tokens, inner = dy.shape
    return (dy.new_empty((0 if weight is None else inner // 128, tokens), dtype=torch.float64),)


# Memory that a kernel needs between its launches: functions of the op's arguments. Uninitialised, dropped after the
# call; a caching allocator hands it out again only to what runs later on the same stream.
_WORKSPACES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "rms_norm_backward": _norm_backward_workspace,
    "swiglu_backward_quantize": _row_sums_workspace,
    "swiglu_backward_quantize_grouped": _row_sums_workspace,
}


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
