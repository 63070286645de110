"""From the functions of a native module to the kernels of ops.

A native function takes an op's arguments in their order, then one tensor for each output, then its workspaces
(csrc/bindings/kernels.h). What stands around it is the same for every op: operands take a form that the kernel reads, outputs
are allocated as the op's `fake` says, and tensors that the op writes in place get a new version, so that autograd notices.
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

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) < len(names):
            args = (*args, *(_argument(schema, i, kwargs) for i in range(len(args), len(names))))
        given = args
        if adapt is not None:
            given = tuple(adapt[i](x) if i in adapt and x is not None else x for i, x in enumerate(args))
        outputs = fake(*args)
        if prepare is not None:
            prepare()
        results = () if outputs is None else (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        native(*given, *results, *(() if workspaces is None else workspaces(*given)))
        for i in mutated:
            for tensor, copy in zip(
                _registry.tensors_of([args[i]]), _registry.tensors_of([given[i]]), strict=True
            ):
                if copy is not tensor:
                    tensor.copy_(copy)
                elif not tensor.is_inference():  # those have no version
                    increment_version(tensor)
        return outputs

    return run


def _argument(schema: Any, index: int, kwargs: dict[str, Any]) -> Any:
    argument = schema.arguments[index]
    return kwargs.get(argument.name, argument.default_value)
