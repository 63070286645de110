"""bf16, fp32 and fp64 GEMM: values against fp64, gradients of any order, groups on both paths of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops.gemm import gemm, gemm_grouped, gemm_masked, wgrad, wgrad_grouped

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAN = float("nan")
# Kernels multiply bf16, so that it runs on every backend; the others are the reference's alone.
OTHERS = pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])


def i32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(result: torch.Tensor, exact: torch.Tensor, k: int) -> bool:
    """Within one rounding of the output and the summation error of fp32 (fp64)."""
    unit = {BF16: 2**-8, FP32: 2**-22, FP64: 2**-50}[result.dtype]
    summed = (2**-50 if result.dtype == FP64 else 2**-22) * 4 * max(1, k)
    return bool(((result.double() - exact).abs() <= unit * exact.abs() + summed).all())


def grouped64(a: torch.Tensor, b: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=FP64)
    for g, (start, stop) in enumerate(itertools.pairwise(bounds)):
        out[start:stop] = a[start:stop].double() @ b[g].double().T
    return out


def wgrad64(a: torch.Tensor, b: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    pieces = [a[s:e].double().T @ b[s:e].double() for s, e in itertools.pairwise(bounds)]
    return torch.stack(pieces) if pieces else torch.zeros(0, a.shape[1], b.shape[1], dtype=FP64)


SIZES = pytest.mark.parametrize(("n", "k"), [(8, 16), (33, 144), (136, 576), (0, 16), (8, 0)])


@OTHERS
@pytest.mark.parametrize("m", [0, 1, 7, 65])
@SIZES
def test_dense_values(m, n, k, dtype):
    check_dense_values(m, n, k, dtype)


@pytest.mark.parametrize("m", [0, 1, 7, 65])
@SIZES
def test_dense_values_of_bf16(m, n, k, backend_name):
    check_dense_values(m, n, k, BF16)


def check_dense_values(m, n, k, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    exact = a.double() @ b.double().T
    for result in (gemm(a, b), wgrad(a.T, b.T)):
        assert result.dtype == dtype and result.shape == (m, n) and close(result, exact, k)
    for out_dtype in () if dtype == FP64 else (BF16, FP32):
        for result in (gemm(a, b, out_dtype=out_dtype), wgrad(a.T, b.T, out_dtype=out_dtype)):
            assert result.dtype == out_dtype and close(result, exact, k)


@OTHERS
def test_dense_outputs_and_accumulation(dtype):
    check_dense_outputs_and_accumulation(dtype, slice(4, 28, 2))


def test_bf16_outputs_with_gaps_inside_of_rows():
    check_dense_outputs_and_accumulation(
        BF16, slice(4, 28, 2)
    )  # kernels want the elements of a row side by side


@pytest.mark.parametrize("first", [4, 7, 8])
def test_dense_outputs_and_accumulation_of_bf16(first, backend_name):
    check_dense_outputs_and_accumulation(BF16, slice(first, first + 12))


def check_dense_outputs_and_accumulation(dtype, columns):
    torch.manual_seed(0)
    a, b = torch.randn(9, 40).to(dtype), torch.randn(12, 40).to(dtype)
    for op, left, right in ((gemm, a, b), (wgrad, a.T, b.T)):
        for out_dtype in (FP64,) if dtype == FP64 else (BF16, FP32):
            wide = op(left, right, out_dtype=FP64 if dtype == FP64 else FP32)
            frame = torch.full((16, 40), 777.0, dtype=out_dtype)
            view = frame[3:12, columns]
            assert op(left, right, out=view) is view and torch.equal(
                view, op(left, right, out_dtype=out_dtype)
            )
            old = (torch.randn(9, 12) * 32).to(out_dtype)
            view.copy_(old)
            op(left, right, out=view, accumulate=True)
            assert torch.equal(view, (old.to(wide.dtype) + wide).to(out_dtype))  # one rounding
            view.fill_(777.0)
            assert (frame == 777.0).all()


def test_bf16_sums_are_not_rounded_on_the_way(backend_name):
    # 1 + 4096 * 2^-9 stays 1 if the running sum is kept in bf16.
    a = torch.full((1, 4097), 2.0**-9).to(BF16)
    a[0, 0] = 1.0
    ones = torch.ones(1, 4097, dtype=BF16)
    assert gemm(a, ones).item() == 9.0 and gemm(a, ones, out_dtype=FP32).item() == 9.0
    out = torch.full((1, 1), 256.0, dtype=BF16)
    gemm(torch.tensor([[0.5, 0.5]], dtype=BF16), torch.ones(1, 2, dtype=BF16), out=out, accumulate=True)
    assert out.item() == 256.0  # 257 is a tie: to even
    gemm(torch.tensor([[1.0, 2**-7]], dtype=BF16), torch.ones(1, 2, dtype=BF16), out=out, accumulate=True)
    assert out.item() == 258.0  # the product is not rounded to bf16 before it is added


sizes_of_groups = st.lists(st.sampled_from([0, 0, 1, 2, 3, 8, 33]), min_size=1, max_size=5)


def any_groups(dtypes):
    return given(
        sizes_of_groups,
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from([1, 5, 8, 16]),
        st.sampled_from([1, 7, 8, 24]),
        st.sampled_from(dtypes),
        st.booleans(),
    )


@any_groups([(FP32, None), (FP64, None), (FP32, BF16)])
def test_grouped_values_on_any_shape(sizes, before, after, k, n, dtypes, transposed):
    check_grouped_values(sizes, before, after, k, n, dtypes, transposed)


@any_groups([(BF16, None), (BF16, FP32)])
def test_grouped_values_of_bf16_on_any_shape(backend_name, sizes, before, after, k, n, dtypes, transposed):
    check_grouped_values(sizes, before, after, k, n, dtypes, transposed)


def check_grouped_values(sizes, before, after, k, n, dtypes, transposed):
    """Aligned shapes take torch's grouped_mm in the reference, others a loop: one meaning."""
    torch.manual_seed(0)
    dtype, out_dtype = dtypes
    bounds = list(itertools.accumulate(sizes, initial=before))
    rows = bounds[-1] + after
    a, b, c = (torch.randn(s).to(dtype) for s in ((rows, k), (len(sizes), n, k), (rows, n)))
    if transposed:
        a, b, c = a.T.contiguous().T, b.mT.contiguous().mT, c.T.contiguous().T
    for x in (a, c):
        x[:before], x[bounds[-1] :] = NAN, NAN  # rows of no group are never read
    exact, exact_wgrad = grouped64(a, b, bounds), wgrad64(a, c, bounds)
    offsets = i32(bounds)
    result = gemm_grouped(a, b, offsets, out_dtype=out_dtype)
    assert result.dtype == (out_dtype or dtype) and close(result, exact, k)
    assert (result[:before] == 0).all() and (result[bounds[-1] :] == 0).all()
    gradient = wgrad_grouped(a, c, offsets, out_dtype=out_dtype)
    assert gradient.dtype == (out_dtype or dtype) and close(gradient, exact_wgrad, rows)
    for g, size in enumerate(sizes):
        assert size or (gradient[g] == 0).all()

    out = torch.full((rows + 2, n), 777.0, dtype=result.dtype)
    assert torch.equal(
        gemm_grouped(a, b, offsets, out=out[1:-1])[before : bounds[-1]], result[before : bounds[-1]]
    )
    outside = torch.cat([out[: before + 1], out[bounds[-1] + 1 :]])
    assert (outside == 777.0).all()

    old = torch.randn(gradient.shape).to(gradient.dtype)
    old[:, 0, 0] = -0.0  # adding a zero would turn it into +0
    sink = old.clone()
    wgrad_grouped(a, c, offsets, out=sink, accumulate=True)
    assert close(sink, old.double() + exact_wgrad, rows)
    for g, size in enumerate(sizes):
        assert size or (torch.equal(sink[g], old[g]) and torch.signbit(sink[g, 0, 0]))
    wgrad_grouped(a, c, offsets, out=sink)
    assert close(sink, exact_wgrad, rows)


COUNTS_OF_7 = pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 7], [7, 7, 7], [0, 1, 0]])


@OTHERS
@COUNTS_OF_7
def test_masked_values(counts, dtype):
    check_masked_values(counts, dtype)


@COUNTS_OF_7
def test_masked_values_of_bf16(counts, backend_name):
    check_masked_values(counts, BF16)


def check_masked_values(counts, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 7, 24).to(dtype), torch.randn(3, 16, 24).to(dtype)
    there = torch.arange(7)[None, :] < torch.tensor(counts)[:, None]
    exact = a.double() @ b.double().mT
    a[~there] = NAN
    result = gemm_masked(a, b, i32(counts))
    assert (result[~there] == 0).all() and close(result[there], exact[there], 24)
    out = torch.full((3, 7, 16), 777.0, dtype=dtype)
    assert gemm_masked(a, b, i32(counts), out=out) is out
    assert (out[~there] == 777.0).all() and torch.equal(out[there], result[there])


def test_repeats_bitwise(backend_name):
    torch.manual_seed(0)
    a, b, offsets = torch.randn(100, 64).to(BF16), torch.randn(4, 32, 64).to(BF16), i32([0, 10, 10, 60, 100])
    first = gemm_grouped(a, b, offsets), wgrad_grouped(a, a, offsets)
    for _ in range(20):
        assert torch.equal(gemm_grouped(a, b, offsets), first[0])
        assert torch.equal(wgrad_grouped(a, a, offsets), first[1])


# Gradients

OFFSETS, COUNTS = i32([1, 3, 3, 6]), i32([2, 0, 3])


def functions() -> dict:
    return {
        "gemm": (gemm, (5, 3), (4, 3)),
        "gemm_grouped": (lambda a, b: gemm_grouped(a, b, OFFSETS), (7, 2), (3, 4, 2)),
        "gemm_masked": (lambda a, b: gemm_masked(a, b, COUNTS), (3, 3, 2), (3, 4, 2)),
        "wgrad": (wgrad, (5, 3), (5, 4)),
        "wgrad_grouped": (lambda a, b: wgrad_grouped(a, b, OFFSETS), (7, 2), (7, 3)),
    }


def plain(name: str):
    """The same functions in ordinary PyTorch, for autograd to differentiate."""
    rows = torch.arange(7)
    member = torch.stack([(rows >= s) & (rows < e) for s, e in itertools.pairwise(OFFSETS.tolist())])
    there = (torch.arange(3)[None, :] < COUNTS[:, None]).unsqueeze(-1)
    return {
        "gemm": lambda a, b: a @ b.T,
        "gemm_grouped": lambda a, b: torch.einsum("gt,tk,gnk->tn", member.to(a), a, b),
        "gemm_masked": lambda a, b: a @ b.mT * there,
        "wgrad": lambda a, b: a.T @ b,
        "wgrad_grouped": lambda a, b: torch.einsum("gt,tm,tn->gmn", member.to(a), a, b),
    }[name]


@pytest.mark.parametrize("name", functions())
def test_gradients_of_first_and_second_order(name):
    function, a_shape, b_shape = functions()[name]
    torch.manual_seed(0)
    a = torch.randn(a_shape, dtype=FP64, requires_grad=True)
    b = torch.randn(b_shape, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


@pytest.mark.parametrize("name", functions())
@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_gradients_against_autograd(name, which):
    check_gradients(name, FP32, 1e-5, which)


@pytest.mark.parametrize("name", functions())
@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_gradients_of_bf16_against_autograd(name, which, backend_name):
    check_gradients(name, BF16, 2e-2, which)


def check_gradients(name, dtype, tolerance, which):
    function, a_shape, b_shape = functions()[name]
    torch.manual_seed(0)
    a, b = torch.randn(a_shape).to(dtype), torch.randn(b_shape).to(dtype)
    wanted = [x.double().requires_grad_() for x in (a, b)]
    a.requires_grad_(which != "b")
    b.requires_grad_(which != "a")
    result, exact = function(a, b), plain(name)(*wanted)
    upstream = torch.randn(result.shape).to(dtype)
    result.backward(upstream)
    exact.backward(upstream.double())
    assert torch.allclose(result.double(), exact, rtol=tolerance, atol=tolerance)
    for x, want in zip((a, b), wanted, strict=True):
        if x.requires_grad:
            assert x.grad.dtype == dtype
            assert torch.allclose(x.grad.double(), want.grad, rtol=tolerance, atol=tolerance)
        else:
            assert x.grad is None


def test_gradients_skip_padding_and_foreign_rows(backend_name):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(shape).to(BF16)

    a, b = draw(3, 3, 4), draw(3, 5, 4).requires_grad_()
    a[0, 2], a[1] = NAN, NAN
    a.requires_grad_()
    upstream = draw(3, 3, 5)
    upstream[0, 2], upstream[1] = NAN, NAN
    gemm_masked(a, b, COUNTS).backward(upstream)
    assert b.grad.isfinite().all() and (b.grad[1] == 0).all() and (a.grad[0, 2] == 0).all()
    a, b = draw(7, 4), draw(3, 5, 4).requires_grad_()
    a[0], a[6] = NAN, NAN
    a.requires_grad_()
    upstream = draw(7, 5)
    upstream[0] = NAN
    gemm_grouped(a, b, OFFSETS).backward(upstream)
    assert b.grad.isfinite().all() and (a.grad[[0, 6]] == 0).all() and (b.grad[1] == 0).all()


def test_gradient_of_a_wider_output_is_rounded_to_the_operands(backend_name):
    torch.manual_seed(0)
    a = torch.randn(5, 3).to(BF16).requires_grad_()
    b = torch.randn(4, 3).to(BF16).requires_grad_()
    upstream = torch.randn(5, 4)
    gemm(a, b, out_dtype=FP32).backward(upstream)
    assert torch.equal(a.grad, gemm(upstream.to(BF16), b.detach().T))
    assert torch.equal(b.grad, wgrad(upstream.to(BF16), a.detach()))
