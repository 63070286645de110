"""How FP8 modules meet torch.compile: they stay out of its graphs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager_island(function: Function) -> Function:
    """Run `function` as it is inside a compiled model, with a graph break on either side.

    There is nothing in it to fuse, and a graph must not hold what belongs to one step: which copies of a weight are fresh,
    and whether a gradient is the first of its step. `torch.compiler.disable` does it, but importing the compiler takes
    seconds, so that it waits until somebody else has.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def island(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(
                torch.compiler.disable(function, reason="FP8 modules of deepseek_ops run eagerly")
            )
        return disabled[0](*args, **kwargs)

    island._torchdynamo_disable = True  # type: ignore[attr-defined] # this wrapper need not be traced either
    return cast(Function, island)
