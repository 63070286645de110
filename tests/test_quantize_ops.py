"""The FP8 quantisers as torch ops: opcheck, torch.compile, storage, threads and argument errors."""

from __future__ import annotations

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops import quantize as quant
from deepseek_ops._registry import OPS

from .quantize_cases import E4M3, codes, i32, random_tensor


def op_cases():
    x, offsets = torch.randn(130, 200), i32([0, 60, 60, 129])
    w = torch.randn(2, 130, 200)
    q, s = quant.quantize_1x128(x)
    q_t, s_t = quant.quantize_128x1(x)
    qw, sw = quant.quantize_128x128(w)
    packed, packed_scale = quant.pack_e5m6(x)
    return [
        ("quantize_1x128", (x, True, False)),
        ("quantize_1x128", (x.bfloat16(), False, True)),
        ("quantize_128x1", (x, False)),
        ("quantize_128x1", (torch.randn(130, 3).t(), True)),
        ("quantize_128x1_grouped", (x, offsets, False)),
        ("quantize_1x128_128x1", (x, False)),
        ("quantize_1x128_128x1_grouped", (x, offsets, True)),
        ("quantize_128x128", (w, False)),
        ("quantize_128x128", (w[0].t(), True)),
        ("transpose_128x128", (qw, sw)),
        ("requantize_128x1", (q, s)),
        ("requantize_128x1_grouped", (q, s, offsets)),
        ("requantize_e5m6_128x1", (packed, packed_scale, 200)),
        ("requantize_e5m6_128x1_grouped", (packed, packed_scale, 200, offsets)),
        ("dequantize_1x128", (q, s, torch.bfloat16)),
        ("dequantize_128x1", (q_t, s_t, 130, torch.float64)),
        ("dequantize_128x128", (qw, sw, torch.float32)),
    ]


named = {"argnames": "name, args", "ids": lambda v: v if isinstance(v, str) else ""}


@pytest.mark.parametrize(**named, argvalues=op_cases())
def test_opcheck(name, args, backend_name):
    check_op(name, args)


def check_op(name, args):
    fp8 = any(isinstance(a, torch.Tensor) and a.dtype == E4M3 for a in args)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not fp8:  # opcheck's own comparison of inputs before and after does not exist for fp8
        tests.append("test_schema")
    torch.library.opcheck(OPS[name].raw, args, test_utils=tests)


def test_compiles_without_a_graph_break():
    def step(x, w, offsets):
        q, scale, q_t, scale_t, padded = quant.quantize_1x128_128x1(x, offsets=offsets, pow2=True)
        r_t, r_scale, _ = quant.requantize_128x1(q, scale, offsets=offsets)
        back = quant.dequantize_128x1(r_t, r_scale, r_t.shape[1])
        wq = quant.dequantize_128x128(*quant.transpose_128x128(*quant.quantize_128x128(w)))
        y = (x - quant.dequantize_1x128(*quant.quantize_1x128(x))) @ w.t()
        return y.sum() + back.sum() + wq.sum() + quant.dequantize_128x1(q_t, scale_t, 128).sum() + padded[-1]

    x = torch.randn(150, 160, requires_grad=True)
    w = torch.randn(130, 160, requires_grad=True)
    offsets = i32([0, 20, 140])
    expected = torch.autograd.grad(step(x, w, offsets), (x, w))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, offsets), step(x, w, offsets))
    for got, want in zip(torch.autograd.grad(compiled(x, w, offsets), (x, w)), expected, strict=True):
        assert torch.equal(got, want)


def test_outputs_never_share_storage_with_inputs(backend_name):
    x = torch.randn(128, 128)
    q, scale = quant.quantize_1x128(x)
    before = [x.clone(), codes(q), scale.clone()]
    results = [
        *quant.quantize_1x128_128x1(x),
        *quant.requantize_128x1(q, scale),
        *quant.transpose_128x128(q[:1, :1], scale[:1, :1]),
        quant.dequantize_1x128(q, scale),
        quant.requantize_e5m6_128x1(*quant.pack_e5m6(x), 128)[0],
    ]
    for result in results:
        result.view(torch.uint8).fill_(1)
    assert torch.equal(x, before[0]) and codes(q) == before[1] and torch.equal(scale, before[2])


def test_bytes_do_not_depend_on_the_number_of_threads():
    x = random_tensor(17, 1024, 256)
    first = [t.view(torch.uint8) for t in quant.quantize_1x128_128x1(x)]
    torch.set_num_threads(2)
    try:
        second = [t.view(torch.uint8) for t in quant.quantize_1x128_128x1(x)]
    finally:
        torch.set_num_threads(1)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


X, Q = torch.ones(4, 256), torch.ones(4, 256).to(E4M3)
SCALE = torch.ones(2, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quant.quantize_1x128(X.double()), "x: must be bfloat16 or float32; got float64"),
        (lambda: quant.quantize_1x128([1.0]), "x: must be a torch.Tensor; got list"),
        (lambda: quant.quantize_1x128(X[0]), r"x: must have 2 dimension\(s\); got shape \(256,\)"),
        (lambda: quant.quantize_128x1(X[None]), "x: must have 2"),
        (lambda: quant.quantize_1x128_128x1(X.half()), "x: must be bfloat16 or float32; got float16"),
        (lambda: quant.quantize_128x1(X, offsets=torch.tensor([0, 4])), "offsets: must be int32; got int64"),
        (lambda: quant.quantize_128x1(X, offsets=i32([[0, 4]])), "offsets: must have 1 dimension"),
        (lambda: quant.quantize_128x1(X, offsets=i32([])), "offsets: must have one element more than groups"),
        (lambda: quant.quantize_1x128_128x1(X, offsets=i32([])), "offsets: must have one element more"),
        (
            lambda: quant.quantize_128x1(X, offsets=i32([0, 4]).to("meta")),
            "offsets: must be on cpu; got meta",
        ),
        (lambda: quant.requantize_128x1(Q, SCALE, offsets=i32([])), "offsets: must have one element more"),
        (lambda: quant.requantize_128x1(X, SCALE), "q: must be float8_e4m3fn; got float32"),
        (
            lambda: quant.requantize_128x1(Q, SCALE[:1]),
            r"scale: must have shape \[2, 4\]; got shape \(1, 4\)",
        ),
        (lambda: quant.dequantize_1x128(Q, SCALE.double()), "scale: must be float32; got float64"),
        (lambda: quant.dequantize_1x128(Q, SCALE, dtype=torch.int32), "dtype: must be one of"),
        (lambda: quant.quantize_128x128(X[0]), "w: must have 2 or 3 dimension"),
        (lambda: quant.transpose_128x128(Q, SCALE), r"scale: must have shape \[1, 2\]; got shape \(2, 4\)"),
        (lambda: quant.transpose_128x128(X, SCALE), "q: must be float8_e4m3fn"),
        (lambda: quant.dequantize_128x128(Q[None], SCALE), r"scale: must have shape \[1, 1, 2\]"),
        (lambda: quant.dequantize_128x128(Q, SCALE[:1, :2], dtype=torch.half), "dtype: must be one of"),
        (lambda: quant.dequantize_128x1(Q[:, :100], SCALE, 4), "q_t: must have a multiple of 128 columns"),
        (lambda: quant.dequantize_128x1(Q, SCALE[:, :3], 4), r"scale: must have shape \[2, 4\]"),
        (lambda: quant.dequantize_128x1(Q, SCALE, 257), r"tokens: must be in \[0, 256\].*; got 257"),
        (lambda: quant.dequantize_128x1(Q, SCALE, -1), "tokens: must be in"),
        (lambda: quant.dequantize_128x1(Q, SCALE, 4, dtype=torch.half), "dtype: must be one of"),
    ],
)
def test_argument_errors_name_argument_rule_and_value(call, message, backend_name):
    with pytest.raises(ArgumentError, match=message):
        call()
