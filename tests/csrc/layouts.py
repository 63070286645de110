"""What the kernel tests of row-wise families share: layouts of matrices, comparison with backend `modelled`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import deepseek_ops


def shifted(x):
    """The same values, one element off a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def spaced(x):
    """The same values with 16 columns of NaN between rows: still 16-byte loads."""
    return torch.cat([x, torch.full((x.shape[0], 16), math.nan, dtype=x.dtype)], 1)[:, : x.shape[1]]


def oddly_spaced(x):
    """The same values with one column of NaN between rows: rows start anywhere."""
    return torch.cat([x, torch.full((x.shape[0], 1), math.nan, dtype=x.dtype)], 1)[:, : x.shape[1]]


def turned(x):
    """The same values with rows contiguous."""
    return x.t().contiguous().t()


def far(x):
    """The same values in rows more than 2^31 elements apart. What nobody touches of that is never there."""
    stride = 2**31 + 64
    size = ((x.shape[0] - 1) * stride + x.shape[1]) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: named from Python 3.13 on
    room = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8).view(x.dtype)
    view = room.as_strided(x.shape, (stride, 1))
    view.copy_(x)
    return view


def on(tensor, device):
    """The tensor on a device with its strides; itself where it is there already."""
    if tensor.device.type == device:
        return tensor
    size = (
        1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )
    flat = tensor.as_strided((size,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


LAYOUTS = {
    "dense": lambda x: x,
    "shifted": shifted,
    "spaced": spaced,
    "oddly_spaced": oddly_spaced,
    "turned": turned,
    "far": far,
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values, each row with a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (
        x
        * torch.exp2(torch.randint(-6, 7, (shape[0],), generator=generator).float()).view(
            -1, *[1] * (x.ndim - 1)
        )
    ).to(dtype)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Which elements agree; any NaN is as good as another, for its sign and payload are the machine's."""
    if got.dtype == torch.float8_e4m3fn:
        a, b = got.view(torch.uint8), want.view(torch.uint8)
        return (a == b) | ((a & b & 0x7F) == 0x7F)
    if not got.is_floating_point():
        return got == want
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return (got.view(whole) == want.view(whole)) | (got.isnan() & want.isnan())


def assert_modelled(call: Callable[..., Any], *arguments: Any) -> Sequence[torch.Tensor]:
    """The call on the backend of this test gives the bits of backend `modelled`; returns what it gave."""
    got, want = call(*arguments), _modelled(call, arguments)
    got, want = ((t,) if isinstance(t, torch.Tensor) else t for t in (got, want))
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if b is None:
            assert a is None
            continue
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), f"output {index}"
        same = same_bits(a, b)
        first = same.logical_not().nonzero()[:1].tolist()
        assert bool(same.all()), f"output {index} differs in {int((~same).sum())} places, first {first}"
    return got


def _modelled(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with deepseek_ops.backend("modelled"):
        return call(*arguments)
