"""The quantiser kernels against the PyTorch reference, byte for byte, one case for every path through the kernels.

The public tests (tests/test_quantize*.py) hold both to the scalar oracle; here each case is chosen by what the kernel
does with it: 16-byte loads or single elements, tiles that are short on either axis, rows of no group, many groups.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepseek_ops
from deepseek_ops import quantize as quant
from deepseek_ops._registry import absent_reason
from tests.quantize_cases import E4M3, i32, random_tensor, special_rows

KERNEL_BACKENDS = ("emulated", "checked", "cuda")
POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["fp32_scale", "pow2_scale"])


@pytest.fixture(params=KERNEL_BACKENDS)
def kernels(request):
    """`run(function)`: the function's tensors from the kernels and from the reference, moved to the CPU."""
    reason = absent_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param} is absent: {reason}")
    device = "cuda" if request.param == "cuda" else "cpu"

    def compare(function, *tensors):
        with deepseek_ops.backend("reference"):
            want = function(*tensors)
        with deepseek_ops.backend(request.param):
            got = function(*(on(t, device) for t in tensors))
        assert len(got) == len(want)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), f"output {index}"
            same = a.cpu().view(torch.uint8) == b.view(torch.uint8)
            assert bool(same.all()), (
                f"output {index} differs first at byte {same.logical_not().nonzero()[0].tolist()}"
            )

    compare.backend, compare.device = request.param, device
    return compare


def on(tensor, device):
    """The tensor on a device with its strides."""
    if tensor.device.type == device:
        return tensor
    size = (
        1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )
    flat = tensor.as_strided((size,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


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


LAYOUTS = [lambda x: x, shifted, spaced, oddly_spaced, turned]
LAYOUT = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=["dense", "shifted", "spaced", "oddly_spaced", "turned"]
)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# Tokens and channels: whole tiles, short on either axis or on both, channels that 16 does not divide, one of each.
SHAPES = [(128, 256), (129, 144), (63, 576), (256, 130), (1, 128), (4, 16), (200, 7), (1, 1)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.mark.parametrize("official", [False, True], ids=["", "official"])
@POW2
@DTYPE
@LAYOUT
@SHAPE
def test_rows(kernels, shape, layout, dtype, pow2, official):
    x = layout(random_tensor(1, *shape, dtype=dtype))
    kernels(lambda x: quant.quantize_1x128(x, pow2=pow2, official_clamp=official), x)


@POW2
@DTYPE
@LAYOUT
@SHAPE
def test_columns_and_both(kernels, shape, layout, dtype, pow2):
    x = layout(random_tensor(2, *shape, dtype=dtype))
    kernels(lambda x: quant.quantize_128x1(x, pow2=pow2), x)
    kernels(lambda x: quant.quantize_1x128_128x1(x, pow2=pow2), x)


@POW2
@DTYPE
@LAYOUT
@SHAPE
def test_blocks(kernels, shape, layout, dtype, pow2):
    w = layout(random_tensor(3, *shape, dtype=dtype))
    kernels(lambda w: quant.quantize_128x128(w, pow2=pow2), w)


@DTYPE
@pytest.mark.parametrize("shape", [(3, 130, 144), (2, 128, 128), (2, 20, 10)], ids=str)
def test_batches_of_blocks(kernels, dtype, shape):
    w = random_tensor(4, *shape, dtype=dtype)
    kernels(quant.quantize_128x128, w)
    kernels(quant.quantize_128x128, w.mT)
    kernels(quant.quantize_128x128, w[:1].expand(3, -1, -1))
    with deepseek_ops.backend("reference"):
        q, scale = quant.quantize_128x128(w)
    kernels(quant.transpose_128x128, q, scale)
    kernels(quant.transpose_128x128, q.view(torch.uint8).mT.view(E4M3), scale.mT)


@pytest.mark.parametrize("columns", [128, 384])
@POW2
def test_special_values(kernels, columns, pow2):
    x = special_rows(columns)
    for view in (x, x.bfloat16(), x.t(), x.t().contiguous(), x.t().bfloat16().contiguous()):
        kernels(lambda x: quant.quantize_1x128(x, pow2=pow2), view)
        kernels(lambda x: quant.quantize_1x128_128x1(x, pow2=pow2), view)
        kernels(lambda x: quant.quantize_128x128(x, pow2=pow2), view)
    kernels(lambda x: quant.quantize_1x128(x, pow2=pow2, official_clamp=True), x)


GROUPS = {
    "none": [0],
    "one": [0, 300],
    "empty_ones": [0, 0, 128, 128, 300, 300],
    "rest_before_and_behind": [140, 140, 141, 290],
    "one_row_each": list(range(300)),
    "all_empty": [7] * 40,
}


@pytest.mark.parametrize("layout", [lambda x: x, shifted], ids=["dense", "shifted"])
@DTYPE
@pytest.mark.parametrize("name", GROUPS)
def test_groups(kernels, name, dtype, layout):
    x = layout(random_tensor(5, 300, 48, dtype=dtype))
    offsets = i32(GROUPS[name])
    kernels(lambda x, o: quant.quantize_128x1(x, offsets=o, pow2=True), x, offsets)
    kernels(lambda x, o: quant.quantize_1x128_128x1(x, offsets=o), x, offsets)


@pytest.mark.parametrize("offsets", [[0, 900], [-200, 128], [250, 2**31 - 1]])
def test_wrong_offsets_never_leave_the_tensors(kernels, offsets):
    # Nobody checks the offsets' values; `checked` reports any access outside, the others must at least end.
    x = on(random_tensor(7, 300, 48), kernels.device)
    with deepseek_ops.backend(kernels.backend):
        q_t, scale_t, _ = quant.quantize_128x1(x, offsets=on(i32(offsets), kernels.device))
        both = quant.quantize_1x128_128x1(x, offsets=on(i32(offsets), kernels.device))
    assert torch.equal(both[2].cpu().view(torch.uint8), q_t.cpu().view(torch.uint8))
    assert torch.equal(both[3].cpu(), scale_t.cpu())


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0)], ids=str)
def test_empty(kernels, shape):
    x = torch.zeros(shape)
    kernels(quant.quantize_1x128, x)
    kernels(quant.quantize_1x128_128x1, x)
    kernels(quant.quantize_128x128, x)
    kernels(lambda x, o: quant.quantize_1x128_128x1(x, offsets=o), x, i32([0, 0, 0]))


@POW2
@SHAPE
def test_requantise(kernels, shape, pow2):
    with deepseek_ops.backend("reference"):
        q, scale = quant.quantize_1x128(random_tensor(6, *shape), pow2=pow2)
        special, special_scale = quant.quantize_1x128(special_rows(256))
    kernels(quant.requantize_128x1, q, scale)
    kernels(quant.requantize_128x1, special, special_scale)
    offsets = i32([0, shape[0] // 3, shape[0] // 3, shape[0]])
    kernels(lambda q, s, o: quant.requantize_128x1(q, s, offsets=o), q, scale, offsets)


def test_the_same_bytes_in_every_run(kernels):
    x = random_tensor(8, 257, 272, dtype=torch.bfloat16)
    for _ in range(3):
        kernels(quant.quantize_1x128_128x1, x)
