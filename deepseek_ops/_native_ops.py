"""From the functions of a native module to the kernels of ops.

A native function takes an op's arguments in their order, then one tensor for each output, then its workspaces
(csrc/bindings/kernels.h). What stands around it is the same for every op: operands take a form that the kernel reads, outputs
are allocated as the op's `fake` says, and tensors that the op writes in place get a new version, so that autograd notices.
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
from ._native_arguments import OPERANDS, WORKSPACES


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
    adapt = OPERANDS.get(op.name)
    workspaces = WORKSPACES.get(op.name)

    padded = _PADDED_ROWS.get(op.name, ())
    workspaces = _WORKSPACES.get(op.name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if adapt is not None:
            args = tuple(adapt[i](x) if i in adapt else x for i, x in enumerate(args))
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        results = () if outputs is None else (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        native(*args, *results, *(() if workspaces is None else workspaces(*args)))
        native(*args, *results, *(workspaces(*args) if workspaces is not None else ()))
        for i in mutated:
            if isinstance(args[i], torch.Tensor) and not args[i].is_inference():  # those have no version
                increment_version(args[i])
        return outputs

    return run


# Operands that the kernels read by TMA: rows at multiples of 16 bytes. The quantisers return dense rows, so that a K
# that is no multiple of 16 needs a copy here; the shapes of DeepSeek-V3 never do.
_PADDED_ROWS = {"fp8_gemm": (0, 2), "fp8_gemm_": (0, 2)}

# Memory that a kernel needs between its launches: functions of the op's arguments. Uninitialised, dropped after the
# call; a caching allocator hands it out again only to what runs later on the same stream.
_WORKSPACES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "balance_loss": lambda scores, topk_idx, cu_seqlens, *_: (
        scores.new_empty((cu_seqlens.shape[0] - 1) * scores.shape[1] + 1, dtype=torch.int32),
        scores.new_empty(scores.shape[0]),
    ),
    "permute": lambda x, topk_idx, *_: (_row_of_slot(topk_idx),),
    "permute_quantized": lambda q, scale, topk_idx, *_: (_row_of_slot(topk_idx),),
    "unpermute": lambda y, source, *_: (_row_of_slot(source),),
    "unpermute_backward": lambda dout, y, source, *_: (_row_of_slot(source),),
}


def _row_of_slot(slots: torch.Tensor) -> torch.Tensor:
    return slots.new_empty(slots.numel(), dtype=torch.int32)


def _rows_for_tma(x: torch.Tensor) -> torch.Tensor:
    size = x.element_size()
    if x.ndim != 2 or x.stride(1) != 1 or x.stride(0) * size % 16 == 0 or x.numel() == 0:
        return x
    columns = x.shape[1]
    room = x.new_empty(x.shape[0], -(-columns * size // 16) * 16 // size)
    room[:, :columns].copy_(x)
    return room[:, :columns]


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
