"""How FP8 modules meet torch.compile: they stay out of its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def eager_island(function: Function) -> Function:
    """Run `function` as it is inside a compiled model, with a graph break on either side.

    There is nothing in it to fuse, and a graph must not hold what belongs to one step: which copies of the weight are
    fresh, and whether a gradient is the first of its step. The mark is the one that `torch.compiler.disable` sets;
    calling that here would import the compiler, seconds, for everybody.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
