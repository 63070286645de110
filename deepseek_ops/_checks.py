"""Argument checks: every limit is tested on the host before work starts.

A message always has the same three parts, so that a user can act on it without reading source:
the argument, the rule it broke, and the value it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn, cast

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
    if not _fits(tensor, dtype, ndim, shape, device):
        _explain(argument, tensor, dtype, ndim, shape, device)
    return cast(torch.Tensor, tensor)


def _fits(
    tensor: object,
    dtype: torch.dtype | Sequence[torch.dtype] | None,
    ndim: int | Sequence[int] | None,
    shape: Sequence[int | None] | None,
    device: torch.device | None,
) -> bool:
    """Whether a tensor keeps every rule: one pass that builds no message, since all but one call in a million pass."""
    if not isinstance(tensor, torch.Tensor):
        return False
    if dtype is not None:
        have = tensor.dtype
        if have is not dtype and (isinstance(dtype, torch.dtype) or have not in dtype):
            return False
    if ndim is not None:
        dims = tensor.ndim
        if dims != ndim and (isinstance(ndim, int) or dims not in ndim):
            return False
    if shape is not None:
        sizes = tensor.shape
        if len(sizes) != len(shape):
            return False
        for size, want in zip(sizes, shape):  # noqa: B905 (equal, see above)
            if want is not None and size != want:
                return False
    return device is None or tensor.device == device


def _explain(
    argument: str,
    tensor: object,
    dtype: torch.dtype | Sequence[torch.dtype] | None,
    ndim: int | Sequence[int] | None,
    shape: Sequence[int | None] | None,
    device: torch.device | None,
) -> None:
    """Raise for the first rule that the tensor breaks."""
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


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value outside a short list, naming the list."""
    if value not in choices:
        fail(argument, f"must be one of {', '.join(map(repr, choices))}", repr(value))


def check_range(argument: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    """Refuse a number outside ``[low, high]`` (NaN is outside every range)."""
    if not math.isnan(value) and (low is None or value >= low) and (high is None or value <= high):
        return
    bounds = f"in [{'-inf' if low is None else low}, {'inf' if high is None else high}]"
    fail(argument, f"must be {bounds}", value)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for a >= 0 and b > 0."""
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    """Smallest multiple of b that is not below a."""
    return ceil_div(a, b) * b
