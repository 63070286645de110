"""The SwiGLU kernels against backend `modelled`, bit for bit, one case for every path through them.

What the ops mean is proved in tests/test_activation.py; cases here are chosen by what a kernel does with them: 16-byte
pieces or single elements, short tiles on either axis, several teams a block or several passes, groups of every kind.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, emulation, quantize
from deepseek_ops.activation import swiglu_backward_quantize
from tests.csrc.layouts import (
    DTYPE,
    LAYOUT,
    assert_modelled,
    far,
    normal,
    oddly_spaced,
    same_bits,
    shifted,
    spaced,
)
from tests.quantize_cases import i32, on_reference

OPS = torch.ops.deepseek_ops
# Rows and I: one of each; whole tiles; short on either axis; I that 16 does not divide; several passes of a team.
SHAPES = [(1, 1), (64, 128), (65, 144), (7, 640), (5, 2304), (9, 130), (130, 24), (4, 7)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])


def weight_of(rows, weighted):
    return normal(5, rows) if weighted else None


@WEIGHTED
@DTYPE
@LAYOUT
@SHAPE
def test_every_layout(kernel_backend, shape, layout, dtype, weighted):
    rows, inner = shape
    gate_up, dy = layout(normal(1, rows, 2 * inner, dtype=dtype)), layout(normal(2, rows, inner, dtype=dtype))
    weight = weight_of(rows, weighted)
    assert_modelled(OPS.swiglu, gate_up, weight)
    assert_modelled(OPS.swiglu_quantize, gate_up, weight, weighted)
    assert_modelled(OPS.swiglu_backward, dy, gate_up, weight)


SPECIAL = [
    0.0,
    -0.0,
    1e-40,
    3e38,
    -3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
    89.0,
    -89.0,
    -104.0,
    1e-20,
]


@DTYPE
def test_special_values(kernel_backend, dtype):
    gate_up, dy = normal(1, 140, 256, dtype=dtype), normal(2, 140, 128, dtype=dtype)
    for i, value in enumerate(SPECIAL):
        gate_up[3 * i, 5 * i] = gate_up[3 * i + 1, 128 + 5 * i] = dy[3 * i + 2, 5 * i] = value
    weight = weight_of(140, True)
    weight[120], weight[125] = float("inf"), float("nan")
    assert_modelled(OPS.swiglu, gate_up, weight)
    assert_modelled(OPS.swiglu_quantize, gate_up, weight, False)
    assert_modelled(OPS.swiglu_backward, dy, gate_up, weight)
    if dtype == torch.bfloat16:
        assert_modelled(swiglu_backward_quantize, dy, gate_up, weight)
        codes, scale = on_reference(quantize.quantize_1x128)(gate_up)
        assert_modelled(cast, dy, codes, weight, scale, None, False)


def cast(dy, gate_up, weight, scale, offsets, pow2):
    return swiglu_backward_quantize(dy, gate_up, weight, gate_up_scale=scale, offsets=offsets, pow2=pow2)


GROUPS = {
    "dense": None,
    "none": [0],
    "one": [0, 150],
    "empty_ones": [0, 0, 128, 128, 150, 150],
    "rest_before_and_behind": [40, 40, 41, 140],
    "one_row_each": list(range(10)),
    "all_empty": [7] * 4,
}


@WEIGHTED
@pytest.mark.parametrize("cached", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("name", GROUPS)
def test_backward_with_casts(kernel_backend, name, cached, weighted):
    rows, inner = 150, 128 if len(GROUPS[name] or ()) > 9 else 256
    dy, gate_up = (
        normal(1, rows, inner, dtype=torch.bfloat16),
        normal(2, rows, 2 * inner, dtype=torch.bfloat16),
    )
    scale = None
    if cached:
        gate_up, scale = on_reference(quantize.quantize_1x128)(gate_up, pow2=True)
    offsets = None if GROUPS[name] is None else i32(GROUPS[name])
    assert_modelled(cast, dy, gate_up, weight_of(rows, weighted), scale, offsets, weighted)


@pytest.mark.parametrize("rows", [0, 1, 3, 127, 128, 129])
@pytest.mark.parametrize("layout", [spaced, shifted, oddly_spaced, far], ids=lambda f: f.__name__)
def test_rows_and_layouts_of_the_casts(kernel_backend, rows, layout):
    dy, gate_up = (
        layout(normal(i, max(rows, 1), n, dtype=torch.bfloat16))[:rows] for i, n in ((1, 128), (2, 256))
    )
    assert_modelled(swiglu_backward_quantize, dy, gate_up, torch.ones(2 * rows)[::2])
    codes, scale = on_reference(quantize.quantize_1x128)(gate_up)
    wide = torch.zeros(rows, 256 + 8, dtype=torch.uint8)
    wide[:, :256] = codes.view(torch.uint8)
    codes = wide[:, :256].view(codes.dtype)
    assert_modelled(cast, dy, codes, None, scale, None, False)


@pytest.mark.parametrize("offsets", [[0, 900], [-200, 128], [140, 2**31 - 1], [100, 50, 120]])
def test_wrong_offsets_never_leave_the_tensors(kernel_backend, offsets):
    """`checked` reports any access outside, `emulated` must at least end; nobody promises values."""
    if offsets[0] == 100:
        with emulation(off=["race"]):  # two blocks write the same rows
            swiglu_backward_quantize(*inputs(150), offsets=i32(offsets))
    else:
        swiglu_backward_quantize(*inputs(150), offsets=i32(offsets))


def inputs(rows):
    return (
        normal(1, rows, 128, dtype=torch.bfloat16),
        normal(2, rows, 256, dtype=torch.bfloat16),
        normal(3, rows),
    )


@pytest.mark.parametrize("asynchrony", ["eager", "lazy"])
@pytest.mark.parametrize("schedule", ["starve", "pct"])
def test_schedules(kernel_backend, asynchrony, schedule):
    dy, gate_up, weight = inputs(100)
    wide_dy, wide = normal(4, 5, 600, dtype=torch.bfloat16), normal(5, 5, 1200, dtype=torch.bfloat16)
    with emulation(seed=11, asynchrony=asynchrony, schedule=schedule):
        assert_modelled(OPS.swiglu_backward, wide_dy, wide, weight[:5])
        assert_modelled(swiglu_backward_quantize, dy, gate_up, weight)


def test_the_sums_of_weights_agree_to_the_last_bit(kernel_backend):
    """swiglu_backward sums a whole row, the casts sum tiles: both round the same fp64 sum."""
    dy, gate_up, weight = normal(1, 20, 1024), normal(2, 20, 2048), normal(3, 20)
    dy, gate_up = dy.bfloat16(), gate_up.bfloat16()
    whole, tiles = (
        OPS.swiglu_backward(dy, gate_up, weight)[1],
        swiglu_backward_quantize(dy, gate_up, weight).dweight,
    )
    assert bool(same_bits(tiles, whole).all())


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)], ids=str)
def test_empty(kernel_backend, shape):
    rows, inner = shape
    gate_up, dy = torch.zeros(rows, 2 * inner), torch.zeros(rows, inner)
    for weight in (None, torch.ones(rows)):
        assert_modelled(OPS.swiglu, gate_up, weight)
        assert_modelled(OPS.swiglu_quantize, gate_up, weight, False)
        assert_modelled(OPS.swiglu_backward, dy, gate_up, weight)
        assert_modelled(swiglu_backward_quantize, dy.bfloat16(), gate_up.bfloat16(), weight)
        assert_modelled(cast, dy.bfloat16(), gate_up.bfloat16(), weight, None, i32([0, rows, rows]), False)


def test_leading_dimensions(kernel_backend):
    gate_up, dy = normal(1, 4, 3, 2, 144, dtype=torch.bfloat16), normal(2, 4, 3, 2, 72, dtype=torch.bfloat16)
    weight = normal(3, 4, 3, 2)
    for take in (lambda t: t, lambda t: t.transpose(0, 1), lambda t: t[:, 1:], lambda t: t[1, 2, 0]):
        assert_modelled(OPS.swiglu, take(gate_up), take(weight.unsqueeze(-1))[..., 0])
        assert_modelled(OPS.swiglu_backward, take(dy), take(gate_up), take(weight.unsqueeze(-1))[..., 0])


X, W = torch.ones(2, 256), torch.ones(2)


@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("gate_up: must be bfloat16 or float32; got float64", lambda: OPS.swiglu(X.double(), None)),
        ("gate_up: must have an even number of columns", lambda: native().swiglu(X[:, :3], None, X[:, :1].clone())),
        ("weight: must be float32; got bfloat16", lambda: OPS.swiglu(X, W.bfloat16())),
        ("weight: must have one element for each row", lambda: OPS.swiglu(X, W[:1])),
        ("dy: must have shape", lambda: OPS.swiglu_backward(X, X, None)),
        ("dy: must be bfloat16; got float32", lambda: swiglu_backward_quantize(X[:, :128], X)),
        ("gate_up_scale: must be given exactly when gate_up is e4m3",
         lambda: OPS.swiglu_backward_quantize(X[:, :128].bfloat16(), X.bfloat16(), torch.ones(2, 4), None, False)),
        ("gate_up: must have 2 I columns, I a multiple of 128",
         lambda: OPS.swiglu_backward_quantize(X[:, :64].bfloat16(), X[:, :128].bfloat16(), None, None, False)),
        ("offsets: must have 1 dimension",
         lambda: OPS.swiglu_backward_quantize_grouped(
             X[:, :128].bfloat16(), X.bfloat16(), None, None, i32([[0, 1]]), False)),
    ],
)  # fmt: skip
def test_what_kernels_refuse(kernel_backend, sentence, call):
    with pytest.raises(ArgumentError, match=sentence):
        call()


def native():
    from deepseek_ops._native import emulated

    return emulated


def test_the_fused_kernel_reads_what_the_cache_holds(kernel_backend):
    """On e4m3 gate_up: the same as on its dequantised copy."""
    dy, gate_up, weight = inputs(140)
    codes, scale = on_reference(quantize.quantize_1x128)(gate_up)
    with deepseek_ops.backend("reference"):
        values = quantize.dequantize_1x128(codes, scale, dtype=torch.bfloat16)
    for got, want in zip(
        swiglu_backward_quantize(dy, codes, weight, gate_up_scale=scale),
        swiglu_backward_quantize(dy, values, weight),
        strict=True,
    ):
        assert got is want is None or torch.equal(got.view(torch.uint8), want.view(torch.uint8))
