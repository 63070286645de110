"""The quantiser kernels against the PyTorch reference, byte for byte, one case for every path through the kernels.

The public tests (tests/test_quantize*.py) hold both to the scalar oracle; here each case is chosen by what the kernel
does with it: 16-byte loads or single elements, tiles that are short on either axis, rows of no group, many groups.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch

import deepseek_ops
from deepseek_ops import quantize as quant
from deepseek_ops._registry import absent_reason
from tests.csrc.layouts import DTYPE, LAYOUTS, on, shifted, turned
from tests.quantize_cases import E4M3, i32, random_tensor, special_rows

KERNEL_BACKENDS = ("emulated", "checked", "cuda")
IN_THE_EMULATOR = pytest.mark.parametrize("kernels", ["emulated", "checked"], indirect=True)  # not on silicon
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
            want = outputs(function(*tensors))
        with deepseek_ops.backend(request.param):
            got = outputs(function(*(on(t, device) for t in tensors)))
        assert len(got) == len(want)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), f"output {index}"
            if not a.numel():
                continue
            a = a.cpu()
            if a.is_floating_point() and a.element_size() > 1:  # conversions may choose a NaN's payload
                a, b = (torch.where(v.isnan(), torch.nan, v) for v in (a, b))
            same = a.view(torch.uint8) == b.view(torch.uint8)
            assert bool(same.all()), (
                f"output {index} differs first at byte {same.logical_not().nonzero()[0].tolist()}"
            )

    compare.backend, compare.device = request.param, device
    return compare


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


LAYOUT = pytest.mark.parametrize(
    "layout",
    [layout for name, layout in LAYOUTS.items() if name != "far"],  # far_test.cpp goes there
    ids=[name for name in LAYOUTS if name != "far"],
)
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


GRANULARITY = pytest.mark.parametrize("granularity", ["tile", "row"])
# Columns: a multiple of 32 (16-byte pieces of packed rows), of 16, of 8 only, of none; more than a block's 8192.
E5M6_SHAPES = [(130, 160), (17, 144), (63, 24), (5, 130), (2, 8200)]
E5M6_SHAPE = pytest.mark.parametrize("shape", E5M6_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@GRANULARITY
@DTYPE
@LAYOUT
@E5M6_SHAPE
def test_pack_e5m6(kernels, shape, layout, dtype, granularity):
    x = layout(random_tensor(1, *shape, dtype=dtype, spread=6))
    kernels(lambda x: quant.pack_e5m6(x, granularity=granularity), x)


@GRANULARITY
def test_pack_e5m6_of_special_values(kernels, granularity):
    for columns in (384, 100):
        for x in (special_rows(columns), special_rows(columns).bfloat16()):
            kernels(lambda x: quant.pack_e5m6(x, granularity=granularity), x)


def any_bytes(seed, tokens, hidden, granularity, positive=True):
    """Packed rows of every code, NaN, infinities and odd padding included, and scales of any size."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (tokens, -(-hidden // 8) * 12), dtype=torch.uint8, generator=g)
    shape = (tokens,) if granularity == "row" else (-(-hidden // 128), -(-tokens // 4) * 4)
    scale = torch.exp2(torch.randint(-126, 100, shape, generator=g).float())
    return packed, scale * 1.3 if granularity == "row" else scale


@GRANULARITY
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", [lambda x: x, shifted, turned], ids=["dense", "shifted", "turned"])
@E5M6_SHAPE
def test_unpack_e5m6(kernels, shape, layout, out, granularity):
    packed, scale = any_bytes(2, *shape, granularity)
    kernels(
        lambda p, s: quant.unpack_e5m6(p, s, shape[1], granularity=granularity, dtype=out),
        layout(packed),
        scale,
    )


@pytest.mark.parametrize("layout", [lambda x: x, shifted, turned], ids=["dense", "shifted", "turned"])
@E5M6_SHAPE
def test_turn_e5m6(kernels, shape, layout):
    packed, scale = any_bytes(3, *shape, "tile")
    offsets = i32([0, shape[0] // 3, shape[0] // 3, shape[0] - shape[0] // 4])
    kernels(lambda p, s: quant.requantize_e5m6_128x1(p, s, shape[1]), layout(packed), scale)
    kernels(
        lambda p, s, o: quant.requantize_e5m6_128x1(p, s, shape[1], offsets=o), layout(packed), scale, offsets
    )


@pytest.mark.parametrize("offsets", [[0, 900], [-200, 128], [250, 2**31 - 1]])
def test_wrong_offsets_of_the_turn_never_leave_the_tensors(kernels, offsets):
    packed, scale = any_bytes(4, 300, 48, "tile")
    with deepseek_ops.backend(kernels.backend):
        given = (on(t, kernels.device) for t in (packed, scale))
        q_t, *_ = quant.requantize_e5m6_128x1(*given, 48, offsets=on(i32(offsets), kernels.device))
    assert q_t.shape[0] == 48


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("layout", [lambda x: x, shifted, turned], ids=["dense", "shifted", "turned"])
@SHAPE
def test_dequantise(kernels, shape, layout, out):
    g = torch.Generator().manual_seed(5)

    def codes(*shape):
        return layout(torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)).view(E4M3)

    def scales(*shape):
        return torch.exp2(torch.randint(-140, 120, shape, generator=g).float()) * 1.7

    m, k = shape
    kernels(
        lambda q, s: quant.dequantize_1x128(q, s, dtype=out),
        codes(m, k),
        scales(-(-k // 128), -(-m // 4) * 4),
    )
    blocks = (-(-m // 128), -(-k // 128))
    kernels(lambda q, s: quant.dequantize_128x128(q, s, dtype=out), codes(m, k), scales(*blocks))
    batch = torch.randint(0, 256, (3, m, k), dtype=torch.uint8, generator=g).view(E4M3)
    kernels(lambda q, s: quant.dequantize_128x128(q, s, dtype=out), batch, scales(3, *blocks))
    padded = -(-m // 128) * 128
    kernels(
        lambda q, s: quant.dequantize_128x1(q, s, m, dtype=out),
        codes(k, padded),
        scales(padded // 128, -(-k // 4) * 4),
    )


@GRANULARITY
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0)], ids=str)
def test_empty_e5m6_and_values(kernels, shape, granularity):
    m, k = shape
    kernels(lambda x: quant.pack_e5m6(x, granularity=granularity), torch.zeros(shape))
    packed, scale = any_bytes(0, m, k, granularity)
    kernels(lambda p, s: quant.unpack_e5m6(p, s, k, granularity=granularity), packed, scale)
    kernels(lambda p, s: quant.requantize_e5m6_128x1(p, s, k), *any_bytes(0, m, k, "tile"))
    q = torch.zeros(shape, dtype=torch.uint8).view(E4M3)
    kernels(quant.dequantize_1x128, q, torch.ones(-(-k // 128), -(-m // 4) * 4))
    kernels(quant.dequantize_128x128, q, torch.ones(-(-m // 128), -(-k // 128)))


@IN_THE_EMULATOR
@pytest.mark.parametrize("schedule", ["fifo", "random", "starve", "pct"])
def test_schedules_of_e5m6_and_values(kernels, schedule):
    x = random_tensor(6, 70, 288, spread=3)
    packed, scale = any_bytes(7, 70, 288, "tile")
    with deepseek_ops.backend("reference"):
        q_t, scale_t = quant.quantize_128x1(x)
    for seed, asynchrony in enumerate(("eager", "random", "lazy")):
        with deepseek_ops.emulation(seed=seed, schedule=schedule, asynchrony=asynchrony):
            kernels(quant.pack_e5m6, x)
            kernels(lambda x: quant.pack_e5m6(x, granularity="row"), torch.cat([x] * 40, 1)[:2])
            kernels(lambda p, s: quant.unpack_e5m6(p, s, 288), packed, scale)
            kernels(lambda p, s: quant.requantize_e5m6_128x1(p, s, 288), packed, scale)
            kernels(lambda q, s: quant.dequantize_128x1(q, s, 70), q_t, scale_t)


def test_outputs_of_e5m6_and_values_stay_in_their_bounds():
    """Canaries around every output, by the native functions themselves; inputs stay what they are."""
    reason = absent_reason("emulated")
    if reason:
        pytest.skip(f"backend emulated is absent: {reason}")
    native = importlib.import_module("deepseek_ops._native.emulated")
    tokens, hidden = 67, 130
    x = random_tensor(8, tokens, hidden)
    packed, scale = any_bytes(9, tokens, hidden, "tile")
    codes = torch.randint(0, 256, (tokens, hidden), dtype=torch.uint8).view(E4M3)
    codes_t = torch.randint(0, 256, (hidden, 128), dtype=torch.uint8).view(E4M3)
    f32, u8 = torch.float32, torch.uint8
    for name, inputs, scalars, wanted in (
        ("pack_e5m6", (x,), ("tile",), (((tokens, 204), u8), ((2, 68), f32))),
        ("pack_e5m6", (x,), ("row",), (((tokens, 204), u8), ((tokens,), f32))),
        ("unpack_e5m6", (packed, scale), (hidden, "tile", f32), (((tokens, hidden), f32),)),
        ("requantize_e5m6_128x1", (packed, scale), (hidden,), (((hidden, 128), E4M3), ((1, 132), f32))),
        ("dequantize_1x128", (codes, torch.ones(2, 68)), (f32,), (((tokens, hidden), f32),)),
        ("dequantize_128x128", (codes, torch.ones(1, 2)), (f32,), (((tokens, hidden), f32),)),
        ("dequantize_128x1", (codes_t, torch.ones(1, 132)), (tokens, f32), (((tokens, hidden), f32),)),
    ):
        rooms, outs = [], []
        for shape, dtype in wanted:
            size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
            room = torch.full((size + 512,), 0x5A, dtype=torch.uint8)
            rooms.append((room, size))
            outs.append(room[256 : 256 + size].view(dtype).view(shape))
        before = [t.view(u8).clone() for t in inputs]
        getattr(native, name)(*inputs, *scalars, *outs)
        for room, size in rooms:
            assert bool((room[:256] == 0x5A).all()) and bool((room[256 + size :] == 0x5A).all()), name
        assert all(map(torch.equal, (t.view(u8) for t in inputs), before)), name


def test_the_same_bytes_in_every_run(kernels):
    x = random_tensor(8, 257, 272, dtype=torch.bfloat16)
    for _ in range(3):
        kernels(quant.quantize_1x128_128x1, x)
