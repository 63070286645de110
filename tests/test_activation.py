"""SwiGLU against a scalar definition, autograd of the plain formula, and its own composition with quantisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError, activation
from deepseek_ops.activation import swiglu, swiglu_backward, swiglu_backward_quantize
from deepseek_ops.quantize import dequantize_1x128, quantize_1x128, quantize_1x128_128x1, quantize_128x1
from deepseek_ops.reference import activation as reference
from tests.quantize_cases import on_reference


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(gate_up, weight):
    rows = []
    for t, row in enumerate(gate_up.tolist()):
        inner = len(row) // 2
        w = 1.0 if weight is None else weight[t].item()
        rows.append([g / (1 + math.exp(-g)) * u * w for g, u in zip(row[:inner], row[inner:], strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(gate_up.shape[0], gate_up.shape[1] // 2)


def plain(gate_up, weight):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up if weight is None else F.silu(gate) * up * weight[..., None]


@given(st.integers(0, 6), st.integers(0, 40), st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_forward_is_the_scalar_definition(backend_name, rows, inner, weighted, dtype):
    gate_up = randn(rows, 2 * inner, seed=rows, dtype=dtype) * 3
    weight = randn(rows, seed=1) if weighted else None
    out = activation.swiglu(gate_up, weight)
    exact = oracle(gate_up, weight)
    half_ulp = 2.0 ** (torch.frexp(exact).exponent.double() - 9) if dtype == torch.bfloat16 else 0
    assert out.dtype == dtype and out.shape == (rows, inner)
    assert ((out.double() - exact).abs() <= half_ulp + 2.0**-20 * exact.abs()).all()  # rounded once


def test_the_gate_is_the_first_half(backend_name):
    assert activation.swiglu(torch.tensor([[0.0, 5.0, 7.0, 0.0]])).tolist() == [[0.0, 0.0]]
    assert activation.swiglu(torch.tensor([[100.0, 2.0]]), torch.tensor([0.5])).tolist() == [[100.0]]
    assert activation.swiglu(torch.tensor([[-1000.0, 2.0, 1000.0, 1.0]]))[0, 0].item() == 0


def test_gradcheck():
    gate_up, weight = randn(3, 10).double().requires_grad_(), randn(3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(activation.swiglu, (gate_up,))
    assert torch.autograd.gradcheck(activation.swiglu, (gate_up, weight))
    stacked = randn(2, 2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(activation.swiglu, (stacked, randn(2, 2).double().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_in_working_precision(backend_name, dtype, weighted, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 24 * 100)  # several chunks, the last one short
    gate_up, grad = randn(230, 48, dtype=dtype), randn(230, 24, seed=1, dtype=dtype)
    weight = randn(230, seed=2) if weighted else None
    ours = [t.clone().requires_grad_() for t in (gate_up, weight) if t is not None]
    wide = [t.double().requires_grad_() for t in (gate_up, weight) if t is not None]
    out = activation.swiglu(*ours)
    out.backward(grad)
    exact = plain(*wide, *([] if weighted else [None]))
    exact.backward(grad.double())
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    torch.testing.assert_close(out.double(), exact, rtol=unit, atol=1e-6)
    torch.testing.assert_close(ours[0].grad.double(), wide[0].grad, rtol=unit, atol=1e-6)
    assert ours[0].grad.dtype == dtype
    if weighted:
        torch.testing.assert_close(ours[1].grad.double(), wide[1].grad, rtol=1e-5, atol=1e-5)
        assert ours[1].grad.dtype == torch.float32


@given(st.integers(0, 6), st.sampled_from([1, 64, 128, 200]), st.booleans(), st.booleans())
def test_quantize_is_the_composition(backend_name, rows, inner, pow2, weighted):
    for dtype in (torch.bfloat16, torch.float32):
        gate_up = randn(rows, 2 * inner, seed=rows, dtype=dtype)
        weight = randn(rows, seed=1) if weighted else None
        q, scale = activation.swiglu_quantize(gate_up, weight, pow2=pow2)
        want_q, want_scale = quantize_1x128(activation.swiglu(gate_up, weight), pow2=pow2)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)


def same_bytes(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(
    st.sampled_from([0, 1, 130, 257]),
    st.sampled_from([128, 256]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, [0, 0, 100, 257], [3, 130], [0]]),
    st.booleans(),
)
def test_backward_with_casts_is_the_composition(backend_name, rows, inner, weighted, pow2, offsets, cached):
    dy, gate_up = (randn(rows, n, seed=n, dtype=torch.bfloat16) for n in (inner, 2 * inner))
    weight = randn(rows, seed=1) if weighted else None
    groups = {}
    if offsets is not None:
        groups["offsets"] = torch.tensor(offsets, dtype=torch.int32).clamp_max(rows)
    cache = {}
    if cached:
        codes, cache["gate_up_scale"] = quantize_1x128(gate_up)
        gate_up = on_reference(dequantize_1x128)(codes, cache["gate_up_scale"], dtype=torch.bfloat16)
    got = swiglu_backward_quantize(dy, codes if cached else gate_up, weight, pow2=pow2, **cache, **groups)
    dgate_up, dweight = swiglu_backward(dy, gate_up, weight)
    rows_and_columns = quantize_1x128_128x1(dgate_up, pow2=pow2, **groups)
    act = quantize_128x1(swiglu(gate_up, weight), pow2=pow2, **groups)
    assert all(map(same_bytes, got[:4], rows_and_columns[:4]))
    assert same_bytes(got.act_t, act[0]) and same_bytes(got.act_scale_t, act[1])
    assert (got.dweight is None) == (weight is None)
    if weight is not None:
        torch.testing.assert_close(got.dweight, dweight, rtol=1e-6, atol=1e-6)
    if groups:
        assert torch.equal(got.padded_offsets, act[2])
    else:
        assert got.padded_offsets is None


def test_inf_or_nan_stays_in_its_tiles(backend_name):
    dy, gate_up, weight = randn(140, 128).bfloat16(), randn(140, 256, seed=1).bfloat16(), randn(140, seed=2)
    clean = swiglu(gate_up, weight), swiglu_backward(dy, gate_up, weight)
    casts = swiglu_backward_quantize(dy, gate_up, weight)
    gate_up[5, 3] = float("nan")
    gate_up[130, 200] = float("inf")  # of up
    spoilt = swiglu(gate_up, weight), swiglu_backward(dy, gate_up, weight)
    hit = torch.zeros(140, 256, dtype=torch.bool)
    hit[5, [3, 131]] = hit[130, [72, 200]] = True
    assert torch.equal(clean[0][~hit[:, :128] & ~hit[:, 128:]], spoilt[0][~hit[:, :128] & ~hit[:, 128:]])
    assert torch.equal(clean[1][0][~hit], spoilt[1][0][~hit])
    rows = [r for r in range(140) if r not in (5, 130)]
    assert torch.equal(clean[1][1][rows], spoilt[1][1][rows])
    after = swiglu_backward_quantize(dy, gate_up, weight)
    assert torch.equal(casts.q.view(torch.uint8)[rows], after.q.view(torch.uint8)[rows])
    columns = [c for c in range(256) if c not in (3, 131, 72, 200)]
    assert torch.equal(casts.q_t.view(torch.uint8)[columns], after.q_t.view(torch.uint8)[columns])
    assert after.act_scale_t[0, 3] == 1 and after.act_t.view(torch.uint8)[3, 5] & 0x7F == 0x7F
    assert torch.equal(casts.dweight[rows], after.dweight[rows])


def test_strides_and_emptiness(backend_name):
    gate_up, weight = randn(8, 6).t(), randn(6, 2, seed=1)[:, 0]
    out = activation.swiglu(gate_up, weight)
    assert out.is_contiguous() and torch.equal(
        out, activation.swiglu(gate_up.contiguous(), weight.contiguous())
    )
    leaf = gate_up.detach().requires_grad_()
    activation.swiglu(leaf, weight).sum().backward()  # an expanded gradient
    again = gate_up.contiguous().requires_grad_()
    activation.swiglu(again, weight).sum().backward()
    assert torch.equal(leaf.grad, again.grad)
    empty, no_weight = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, requires_grad=True)
    activation.swiglu(empty, no_weight).sum().backward()
    assert empty.grad.shape == (0, 8) and no_weight.grad.shape == (0,)
    assert activation.swiglu_quantize(empty.detach())[0].shape == (0, 4)


def test_repeats_bit_by_bit_and_rows_are_independent(backend_name):
    gate_up, weight = randn(300, 130), randn(300, seed=1)
    out = activation.swiglu(gate_up, weight)
    assert torch.equal(out, activation.swiglu(gate_up, weight))
    assert torch.equal(out[5:9], activation.swiglu(gate_up[5:9].clone(), weight[5:9].clone()))


def test_opcheck():
    gate_up, weight, dy = randn(3, 300), randn(3, seed=1), randn(3, 150, seed=2)
    whole = dy[:, :128].bfloat16(), gate_up[:, :256].bfloat16()
    for op, arguments in (
        (activation._swiglu, (gate_up, weight)),
        (activation._swiglu, (gate_up.bfloat16(), None)),
        (activation._swiglu_backward, (dy, gate_up, weight)),
        (activation._swiglu_backward, (dy, gate_up, None)),
        (activation._swiglu_quantize, (gate_up, weight, True)),
        (activation._swiglu_backward_quantize, (*whole, None, weight, True)),
        (
            activation._swiglu_backward_quantize_grouped,
            (*whole, None, None, torch.tensor([0, 1, 3]).int(), False),
        ),
    ):
        torch.library.opcheck(op.raw, arguments)


def test_compile_fullgraph():
    def function(gate_up, weight):
        q, scale = activation.swiglu_quantize(gate_up.detach(), weight.detach())
        return activation.swiglu(gate_up.sin(), weight).square().sum() + (q.float().sum() + scale.sum())

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        gate_up, weight = randn(4, 10).requires_grad_(), randn(4, seed=1).requires_grad_()
        run(gate_up, weight).backward()
        results.append((gate_up.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


X, W = torch.zeros(2, 4), torch.ones(2)
DY, GATE_UP = torch.zeros(2, 128), torch.zeros(2, 256)
CODED = (GATE_UP.to(torch.float8_e4m3fn),)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("gate_up", lambda: activation.swiglu(X.half())),
        ("gate_up", lambda: activation.swiglu(X[:, :3])),
        ("gate_up", lambda: activation.swiglu(torch.zeros(()))),
        ("weight", lambda: activation.swiglu(X, W.bfloat16())),
        ("weight", lambda: activation.swiglu(X.double(), W)),
        ("weight", lambda: activation.swiglu(X, W[:1])),
        ("weight", lambda: activation.swiglu(X, W[:, None])),
        ("gate_up", lambda: activation.swiglu_quantize(X.double())),
        ("gate_up", lambda: activation.swiglu_quantize(X[0])),
        ("gate_up", lambda: activation.swiglu_quantize(X[:, :3])),
        ("weight", lambda: activation.swiglu_quantize(X, W[:1])),
        ("dy", lambda: swiglu_backward_quantize(DY.double(), GATE_UP)),
        ("dy", lambda: swiglu_backward_quantize(DY[:, :64], GATE_UP[:, :128])),
        ("gate_up", lambda: swiglu_backward_quantize(DY, GATE_UP[:1])),
        ("gate_up", lambda: swiglu_backward_quantize(DY, GATE_UP, gate_up_scale=torch.ones(2, 4))),
        ("gate_up_scale", lambda: swiglu_backward_quantize(DY, *CODED, gate_up_scale=torch.ones(2, 2))),
        ("weight", lambda: swiglu_backward_quantize(DY, GATE_UP, W[:1])),
        ("offsets", lambda: swiglu_backward_quantize(DY, GATE_UP, offsets=torch.tensor([0, 1]))),
        ("offsets", lambda: swiglu_backward_quantize(DY, GATE_UP, offsets=torch.tensor([]).int())),
    ],
)
def test_argument_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        call()


def test_public_backward_is_the_gradient_and_checks_its_arguments(backend_name):
    gate_up, weight = torch.randn(5, 12, requires_grad=True), torch.rand(5, requires_grad=True)
    dy = torch.randn(5, 6)
    swiglu(gate_up, weight).backward(dy)
    dgate_up, dweight = swiglu_backward(dy, gate_up.detach(), weight.detach())
    assert torch.equal(dgate_up, gate_up.grad) and torch.equal(dweight, weight.grad)
    assert swiglu_backward(dy, gate_up.detach())[1] is None
    with pytest.raises(ArgumentError, match=r"dy: must have shape \[5, 6\]"):
        swiglu_backward(dy[:, :3], gate_up.detach())
