"""RMSNorm against a scalar definition, against autograd of the plain formula, and against its own composition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError, norm
from deepseek_ops.quantize import quantize_1x128

EPS = 1e-6


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(x, weight, eps):
    """Row by row in Python floats."""
    rows = []
    for row in x.tolist():
        rstd = 1 / math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        rows.append([v * rstd * w for v, w in zip(row, weight.tolist(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def plain(x, weight, eps=EPS):
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


@given(st.integers(0, 5), st.integers(1, 70), st.sampled_from([1e-6, 0.5]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_forward_is_the_scalar_definition(backend_name, rows, width, eps, size):
    x, weight = randn(rows, width, seed=rows) * size, randn(width, seed=width)
    expected = oracle(x, weight, eps)
    torch.testing.assert_close(norm.rms_norm(x, weight, eps).double(), expected, rtol=1e-6, atol=1e-30)


@given(st.integers(0, 5), st.integers(1, 70), st.sampled_from([1e-6, 0.5]), st.sampled_from([1e-4, 1.0, 1e4]))
def test_fp64_is_the_scalar_definition(rows, width, eps, size):
    x, weight = (randn(rows, width, seed=rows) * size).double(), randn(width, seed=width).double()
    torch.testing.assert_close(norm.rms_norm(x, weight, eps), oracle(x, weight, eps), rtol=1e-13, atol=1e-30)


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([torch.bfloat16, torch.float32]))
def test_bf16_is_the_exact_value_rounded_once(backend_name, rows, width, weight_dtype):
    x, weight = randn(rows, width, seed=1, dtype=torch.bfloat16), randn(width, seed=2, dtype=weight_dtype)
    y = norm.rms_norm(x, weight)
    exact = oracle(x, weight, EPS)
    # once: half a unit in the last place, and a hair for fp32 inside. Two roundings would exceed it.
    half_ulp = 2.0 ** (torch.frexp(exact).exponent.double() - 9)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= half_ulp + 2.0**-20 * exact.abs()).all()


def test_close_to_torch_in_bf16(backend_name):
    x, weight = randn(64, 96, dtype=torch.bfloat16), randn(96, seed=1, dtype=torch.bfloat16)
    torch.testing.assert_close(norm.rms_norm(x, weight), F.rms_norm(x, [96], weight, EPS), rtol=2**-7, atol=0)


def test_gradcheck():
    x, residual = randn(2, 3, 7).double().requires_grad_(), randn(2, 3, 7, seed=1).double().requires_grad_()
    weight = randn(7, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(norm.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(norm.rms_norm_residual, (x, residual, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_working_precision(backend_name, dtype):
    x, weight, grad = (
        randn(300, 128, dtype=dtype),
        randn(128, seed=1, dtype=dtype),
        randn(300, 128, seed=2, dtype=dtype),
    )
    ours = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    norm.rms_norm(*ours).backward(grad)
    plain(*wide).backward(grad.double())
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for a, b in zip(ours, wide, strict=True):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=max(unit, 1e-5), atol=1e-5)


def test_mixed_weight_dtype_gradient(backend_name):
    x, weight = randn(5, 8, dtype=torch.bfloat16).requires_grad_(), randn(8, seed=1).requires_grad_()
    norm.rms_norm(x, weight).sum().backward()
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain(wide_x, wide_weight).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=2.0**-8, atol=1e-5)


@given(
    st.integers(0, 4),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from(["both", "normed", "sum"]),
)
def test_residual_is_the_two_operations(backend_name, rows, dtype, used):
    x, residual = randn(rows, 40, dtype=dtype), randn(rows, 40, seed=1, dtype=dtype)
    weight, grads = (
        randn(40, seed=2),
        (randn(rows, 40, seed=3, dtype=dtype), randn(rows, 40, seed=4, dtype=dtype)),
    )
    fused = [t.clone().requires_grad_() for t in (x, residual, weight)]
    apart = [t.clone().requires_grad_() for t in (x, residual, weight)]
    normed, total = norm.rms_norm_residual(*fused)
    total_apart = apart[0] + apart[1]
    normed_apart = norm.rms_norm(total_apart, apart[2])
    assert torch.equal(normed, normed_apart) and torch.equal(total, total_apart)
    pick = {"both": slice(None), "normed": slice(0, 1), "sum": slice(1, 2)}[used]
    torch.autograd.backward((normed, total)[pick], grads[pick])
    torch.autograd.backward((normed_apart, total_apart)[pick], grads[pick])
    for a, b in zip(fused, apart, strict=True):
        if b.grad is None:
            assert a.grad.count_nonzero() == 0
        else:  # apart, the two gradients of the sum are rounded before they are added
            torch.testing.assert_close(
                a.grad, b.grad, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=0.02
            )
    assert torch.equal(fused[0].grad, fused[1].grad)


def test_repeats_bit_by_bit_and_rows_are_independent(backend_name):
    x, weight, grad = randn(130, 96), randn(96, seed=1).requires_grad_(), randn(130, 96, seed=2)
    gradients = []
    for _ in range(5):
        weight.grad = None
        norm.rms_norm(x, weight).backward(grad)
        gradients.append(weight.grad)
    assert all(torch.equal(gradients[0], g) for g in gradients)
    assert torch.equal(norm.rms_norm(x, weight)[7:9], norm.rms_norm(x[7:9].clone(), weight))


@given(st.integers(0, 6), st.sampled_from([1, 96, 128, 200, 256]), st.booleans(), st.booleans())
def test_quantize_is_the_composition(backend_name, rows, width, pow2, with_residual):
    for dtype in (torch.bfloat16, torch.float32):
        x, residual = randn(rows, width, dtype=dtype), randn(rows, width, seed=1, dtype=dtype)
        weight = randn(width, seed=2)
        total = x + residual if with_residual else x
        q, scale, rstd, *rest = norm.rms_norm_quantize(
            x, weight, 1e-3, residual=residual if with_residual else None, pow2=pow2
        )
        want_q, want_scale = quantize_1x128(norm.rms_norm(total, weight, 1e-3), pow2=pow2)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)
        torch.testing.assert_close(rstd, torch.rsqrt(total.float().square().mean(-1) + 1e-3))
        assert len(rest) == with_residual and all(torch.equal(r, total) for r in rest)


def test_shapes_strides_and_emptiness(backend_name):
    weight = randn(6, seed=1).requires_grad_()
    x = randn(6, 4, 3).permute(2, 1, 0)
    y = norm.rms_norm(x, weight)
    assert y.is_contiguous() and torch.equal(y, norm.rms_norm(x.contiguous(), weight))
    a, b = norm.rms_norm_residual(x, x, weight)
    assert a.is_contiguous() and b.is_contiguous()
    assert norm.rms_norm(x[0, 0], weight).shape == (6,)
    empty = torch.zeros(0, 6, requires_grad=True)
    norm.rms_norm(empty, weight).sum().backward()
    assert empty.grad.shape == (0, 6) and weight.grad.tolist() == [0.0] * 6
    q, scale, rstd = norm.rms_norm_quantize(empty.detach(), weight.detach())
    assert q.shape == (0, 6) and scale.shape == (1, 0) and rstd.shape == (0,)


def test_a_row_of_zeros_stays_finite(backend_name):
    x = torch.zeros(2, 5, requires_grad=True)
    y = norm.rms_norm(x, torch.ones(5))
    y.sum().backward()
    assert y.count_nonzero() == 0 and x.grad.isfinite().all()


def test_opcheck():
    x, weight = randn(3, 130), randn(130, seed=1)
    rstd = torch.ones(3)
    for op, arguments in (
        (norm._rms_norm, (x, weight, EPS)),
        (norm._rms_norm, (x.t().contiguous().t().bfloat16(), weight, EPS)),
        (norm._rms_norm_residual, (x, x.clone(), weight, EPS)),
        (norm._rms_norm_backward, (x, x, weight, rstd, None)),
        (norm._rms_norm_backward, (x, x, weight, rstd, x)),
        (norm._rms_norm_quantize, (x, weight, EPS, True)),
        (norm._rms_norm_residual_quantize, (x, x.clone(), weight, EPS, False)),
    ):
        torch.library.opcheck(op.raw, arguments)


def test_compile_fullgraph():
    def function(x, residual, weight):
        normed, total = norm.rms_norm_residual(x, residual, weight)
        q, scale, _ = norm.rms_norm_quantize(x.detach(), weight.detach())
        return (norm.rms_norm(normed.sin(), weight) * total).sum() + (q.float().sum() + scale.sum())

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        tensors = [randn(4, 9, seed=i).requires_grad_() for i in (0, 1)] + [randn(9, seed=2).requires_grad_()]
        run(*tensors).backward()
        results.append([t.grad for t in tensors])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_a_row_with_inf_or_nan_stays_alone(backend_name):
    weight, inf, nan = randn(384, seed=1), float("inf"), float("nan")
    x, residual, dy = (randn(9, 384, seed=i, dtype=torch.bfloat16) for i in (2, 3, 4))
    clean = norm.rms_norm_residual(x, residual, weight), norm.rms_norm_quantize(x, weight, residual=residual)
    gradients = torch.ops.deepseek_ops.rms_norm_backward(dy, x, weight, clean[1][2], None)[0]
    x[4, 7], x[6, 300] = inf, nan
    spoilt = norm.rms_norm_residual(x, residual, weight), norm.rms_norm_quantize(x, weight, residual=residual)
    rest = [0, 1, 2, 3, 5, 7, 8]
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a[0].view(torch.uint8)[rest], b[0].view(torch.uint8)[rest])
    assert torch.equal(clean[1][1][:, rest], spoilt[1][1][:, rest])
    assert spoilt[0][0][6].isnan().all() and spoilt[0][0][4, 7].isnan()
    assert spoilt[0][0][4].count_nonzero() == 1  # 1 / sqrt(inf) is 0
    assert (spoilt[1][0][6].view(torch.uint8) & 0x7F).eq(0x7F).all() and spoilt[1][1][:, 6].eq(1).all()
    after = torch.ops.deepseek_ops.rms_norm_backward(dy, x, weight, clean[1][2], None)[0]
    assert torch.equal(gradients[rest], after[rest]) and after[6].isnan().all()


X, W = torch.zeros(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda: norm.rms_norm(X.half(), W)),
        ("x", lambda: norm.rms_norm(torch.zeros(()), W)),
        ("x", lambda: norm.rms_norm(X[:, :0], W[:0])),
        ("weight", lambda: norm.rms_norm(X, W.half())),
        ("weight", lambda: norm.rms_norm(X, W[:3])),
        ("eps", lambda: norm.rms_norm(X, W, -1.0)),
        ("residual", lambda: norm.rms_norm_residual(X, X.bfloat16(), W)),
        ("residual", lambda: norm.rms_norm_residual(X, X[:1], W)),
        ("x", lambda: norm.rms_norm_quantize(X.double(), W)),
        ("x", lambda: norm.rms_norm_quantize(X[0], W)),
        ("weight", lambda: norm.rms_norm_quantize(X, W[:3])),
        ("residual", lambda: norm.rms_norm_quantize(X, W, residual=X[:1])),
    ],
)
def test_argument_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        call()
