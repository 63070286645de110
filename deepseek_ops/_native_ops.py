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
    dense = op.name in _DENSE

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        if padded:
            args = tuple(_rows_for_tma(x) if i in padded else x for i, x in enumerate(args))
        given = [_dense(a) for a in args] if dense else args
        outputs = fake(*args)
        written = () if outputs is None else (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        extra = () if op.workspace is None else (op.workspace(*args),)
        if prepare is not None:
            prepare()
        native(*given, *written, *extra)
        if dense:
            for i in mutated:
                for tensor, copy in zip(args[i], given[i], strict=True):
                    if copy is not tensor:
                        tensor.copy_(copy)
        for tensor in _registry.tensors_of(args[i] for i in mutated):
            if not tensor.is_inference():  # those have no version
                increment_version(tensor)
        return outputs

    return run


# Operands that the kernels read by TMA: rows at multiples of 16 bytes. The quantisers return dense rows, so that a K
# that is no multiple of 16 needs a copy here; the shapes of DeepSeek-V3 never do.
_PADDED_ROWS = {"fp8_gemm": (0, 2), "fp8_gemm_": (0, 2)}


# Ops whose kernels want dense tensors: others are copied, and copied back where the op writes a list of them. What a
# training run keeps (state, caches, codes) is dense.
_DENSE = (
    *("adamw_", "clip_grad_norm"),
    *("unpack_e5m6", "requantize_e5m6_128x1", "requantize_e5m6_128x1_grouped"),
    *("dequantize_1x128", "dequantize_128x1", "dequantize_128x128"),
)


def _dense(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_dense(x) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.contiguous()  # itself where it is dense
    # Packed E5M6 is read in words; a view of its bytes may start anywhere.
    return value.clone() if value.dtype == torch.uint8 and value.data_ptr() % 4 else value


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
