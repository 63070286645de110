"""Argument checks: every limit is tested on the host before work starts.

A message always has the same three parts, so that a user can act on it without reading source:
the argument, the rule it broke, and the value it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch

E4M3 = torch.float8_e4m3fn


class ArgumentError(ValueError):
    """An argument of an op broke one of its rules; nothing was computed or modified."""


def fail(argument: str, rule: str, value: object) -> NoReturn:
    """Raise `ArgumentError` in the house form: ``argument: rule; got value``."""
    raise ArgumentError(f"{argument}: {rule}; got {value}")


def require(condition: bool, argument: str, rule: str, value: object) -> None:
    """Raise `ArgumentError` unless `condition` holds."""
    if not condition:
        fail(argument, rule, value)


def check_tensor(
    argument: str,
    tensor: object,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    ndim: int | Sequence[int] | None = None,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check one tensor argument and return it.

    `shape` may hold `None` for a free dimension. `device` is the device of the first argument, so that
    operands on different devices are refused with both names. Scalars of Python are refused too.
    """
    if not isinstance(tensor, torch.Tensor):
        fail(argument, "must be a torch.Tensor", type(tensor).__name__)
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        require(
            tensor.dtype in allowed, argument, f"must be {names}", str(tensor.dtype).removeprefix("torch.")
        )
    if ndim is not None:
        dims = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        if tensor.ndim not in dims:
            rule = f"must have {' or '.join(map(str, dims))} dimension(s)"
            fail(argument, rule, f"shape {tuple(tensor.shape)}")
    if shape is not None:
        fits = tensor.ndim == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("*" if want is None else str(want) for want in shape)
            fail(argument, f"must have shape [{wanted}]", f"shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        fail(argument, f"must be on {device}", tensor.device)
    return tensor


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value outside a short list, naming the list."""
    require(value in choices, argument, f"must be one of {', '.join(map(repr, choices))}", repr(value))


def check_range(argument: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    """Refuse a number outside ``[low, high]`` (NaN is outside every range)."""
    ok = not math.isnan(value) and (low is None or value >= low) and (high is None or value <= high)
    bounds = f"in [{'-inf' if low is None else low}, {'inf' if high is None else high}]"
    require(ok, argument, f"must be {bounds}", value)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for a >= 0 and b > 0."""
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    """Smallest multiple of b that is not below a."""
    return ceil_div(a, b) * b
