"""The RMSNorm kernels against backend `modelled`, bit for bit, one case for every path through them.

What the ops mean is proved in tests/test_norm.py; cases here are chosen by what a kernel does with them: rows in
registers, in shared memory or read twice; 16-byte pieces or single elements; short last tiles; several teams a block.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from deepseek_ops import ArgumentError, emulation
from tests.csrc.layouts import DTYPE, LAYOUT, assert_modelled, normal

EPS = 1e-6
OPS = torch.ops.deepseek_ops
# Rows and columns: one of each; a team of one warp, two, three; short tiles; 16-byte pieces or not.
SHAPES = [(1, 1), (5, 128), (9, 512), (3, 640), (7, 1536), (6, 208), (17, 130), (4, 7)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
# More columns than a thread's one patch reaches: kept in shared memory; and, in fp32, more than that holds.
WIDE = [(5, 7168), (3, 7184), (2, 18432), (2, 18433), (1, 32768)]


def forward(x, residual, weight):
    assert_modelled(OPS.rms_norm, x, weight, EPS)
    assert_modelled(OPS.rms_norm_residual, x, residual, weight, 1e-3)
    assert_modelled(OPS.rms_norm_quantize, x, weight, EPS, False)
    assert_modelled(OPS.rms_norm_residual_quantize, x, residual, weight, EPS, True)


def backward(dy, x, weight, dresidual):
    rstd = normal(9, x.shape[0]).abs()
    assert_modelled(OPS.rms_norm_backward, dy, x, weight, rstd, None)
    assert_modelled(OPS.rms_norm_backward, dy, x, weight, rstd, dresidual)


@DTYPE
@LAYOUT
@SHAPE
def test_every_layout(kernel_backend, shape, layout, dtype):
    x, other, dy = (layout(normal(seed, *shape, dtype=dtype)) for seed in (1, 2, 3))
    weight = normal(4, shape[1])
    forward(x, other, weight)
    backward(dy, x, weight, other)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@DTYPE
@pytest.mark.parametrize("shape", WIDE, ids=lambda s: f"{s[0]}x{s[1]}")
def test_wide_rows(kernel_backend, shape, dtype, weight_dtype):
    if kernel_backend == "checked" and weight_dtype != dtype:
        shape = (1, shape[1])
    x, other, dy = (normal(seed, *shape, dtype=dtype) for seed in (1, 2, 3))
    weight = normal(4, 1, shape[1], dtype=weight_dtype)[0]
    assert_modelled(OPS.rms_norm, x, weight, EPS)
    assert_modelled(OPS.rms_norm_residual_quantize, x, other, weight, EPS, False)
    assert_modelled(OPS.rms_norm_backward, dy, x, weight, x[:, 0].float().abs(), other)


@pytest.mark.parametrize("weight", ["bf16", "every_second", "shifted"])
def test_weights_of_any_kind(kernel_backend, weight):
    given = {
        "bf16": lambda: normal(4, 1, 384, dtype=torch.bfloat16)[0],
        "every_second": lambda: normal(4, 1, 768)[0, ::2],
        "shifted": lambda: normal(4, 1, 385)[0, 1:],
    }[weight]()
    x, other, dy = (normal(seed, 9, 384, dtype=torch.bfloat16) for seed in (1, 2, 3))
    forward(x, other, given)
    backward(dy, x, given, other)


@pytest.mark.parametrize("rows", [8, 9, 40, 1100])
def test_more_rows_than_blocks(kernel_backend, rows):
    """Blocks that go on, with column sums in shared memory; groups of 8 that are not whole."""
    dy, x = (normal(seed, rows, 128, dtype=torch.bfloat16) for seed in (1, 2))
    rstd = normal(3, rows).abs()
    weight = normal(4, 1, 128)[0]
    want = assert_modelled(OPS.rms_norm_backward, dy, x, weight, rstd, None)
    for parts in (1, 3):
        got = with_parts(kernel_backend, parts)(dy, x, weight, rstd, None)
        assert all(map(torch.equal, got, want))


def with_parts(target, parts):
    """rms_norm_backward with another number of rows in its workspace than the op gives it."""
    native = importlib.import_module(f"deepseek_ops._native.{target}")

    def call(dy, x, weight, rstd, dresidual):
        outputs = torch.empty_like(x), torch.empty_like(weight)
        width = -(-x.shape[1] // 512) * 512
        native.rms_norm_backward(
            dy, x, weight, rstd, dresidual, *outputs, torch.empty(parts, width, dtype=torch.float64)
        )
        return outputs

    return call


def test_sums_in_the_workspace(kernel_backend):
    """8192 columns: shared memory has no room for column sums. 20 rows by one block of two, with a residual."""
    dy, x, other = (normal(seed, 20, 8192, dtype=torch.bfloat16) for seed in (1, 2, 3))
    rstd = normal(5, 20).abs()
    arguments = dy, x, normal(4, 1, 8192)[0], rstd, other
    want = assert_modelled(OPS.rms_norm_backward, *arguments)
    assert all(map(torch.equal, with_parts(kernel_backend, 2)(*arguments), want))


SPECIAL = [0.0, -0.0, 1e-40, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1e20, 1e-20]


@DTYPE
def test_special_values(kernel_backend, dtype):
    x, other, dy = (normal(seed, len(SPECIAL) + 2, 272, dtype=dtype) for seed in (1, 2, 3))
    for row, value in enumerate(SPECIAL):
        x[row, row * 20] = value
    x[-1], other[-1] = 0, 0
    weight = normal(4, 1, 272)[0]
    weight[5] = float("inf")
    forward(x, other, weight)
    backward(dy, x, weight, other)
    assert_modelled(OPS.rms_norm_quantize, x, weight, 0.0, False)


@pytest.mark.parametrize("asynchrony", ["eager", "lazy"])
@pytest.mark.parametrize("schedule", ["starve", "pct"])
def test_schedules(kernel_backend, asynchrony, schedule):
    x, other, dy = (normal(seed, 21, 640, dtype=torch.bfloat16) for seed in (1, 2, 3))
    for seed in range(3):
        with emulation(seed=seed, asynchrony=asynchrony, schedule=schedule):
            forward(x, other, normal(4, 1, 640)[0])
            backward(dy, x, normal(4, 1, 640)[0], other)


def test_the_same_bits_in_every_run(kernel_backend):
    dy, x = (normal(seed, 50, 384, dtype=torch.bfloat16) for seed in (1, 2))
    weight, rstd = normal(3, 1, 384)[0], normal(4, 50).abs()
    first = OPS.rms_norm_backward(dy, x, weight, rstd, None)
    for seed in range(4):
        with emulation(seed=seed):
            again = OPS.rms_norm_backward(dy, x, weight, rstd, None)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("shape", [(0, 128), (0, 130), (2, 0, 64)], ids=str)
def test_empty(kernel_backend, shape):
    x = torch.zeros(shape)
    weight = torch.ones(shape[-1])
    assert_modelled(OPS.rms_norm, x, weight, EPS)
    assert_modelled(OPS.rms_norm_backward, x, x, weight, torch.zeros(shape[:-1]), None)
    if len(shape) == 2:
        assert_modelled(OPS.rms_norm_quantize, x, weight, EPS, False)


def test_leading_dimensions(kernel_backend):
    x = normal(1, 4, 3, 2, 144, dtype=torch.bfloat16)
    weight = normal(2, 1, 144)[0]
    for view in (x, x.transpose(0, 1), x[:, 1:], x[:, :, :1], x[1, 2, 0], x[:, 0, 0].expand(4, 144)):
        assert_modelled(OPS.rms_norm, view, weight, EPS)
        rstd = torch.ones(view.shape[:-1])
        assert_modelled(OPS.rms_norm_backward, view, view, weight, rstd, view)


@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("x: must be bfloat16 or float32; got float64", lambda x, w: OPS.rms_norm(x.double(), w, EPS)),
        ("weight: must be bfloat16 or float32; got float64", lambda x, w: OPS.rms_norm(x, w.double(), EPS)),
        ("weight: must have shape", lambda x, w: OPS.rms_norm(x, w[:3], EPS)),
        ("residual: must have shape", lambda x, w: OPS.rms_norm_residual(x, x[:1], w, EPS)),
        ("residual: must be float32", lambda x, w: OPS.rms_norm_residual(x, x.bfloat16(), w, EPS)),
        ("eps: must not be negative; got -1", lambda x, w: OPS.rms_norm(x, w, -1.0)),
        ("dy: must have shape", lambda x, w: OPS.rms_norm_backward(x[:1], x, w, x[:, 0], None)),
        ("rstd: must have one element for each row of x", lambda x, w: OPS.rms_norm_backward(x, x, w, w[:3], None)),
        ("dresidual: must be float32", lambda x, w: OPS.rms_norm_backward(x, x, w, x[:, 0], x.bfloat16())),
    ],
)  # fmt: skip
def test_what_kernels_refuse(kernel_backend, sentence, call):
    with pytest.raises(ArgumentError, match=sentence):
        call(torch.ones(2, 4), torch.ones(4))
