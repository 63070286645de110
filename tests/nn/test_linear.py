"""Fp8Linear against fp64 products of operands quantised here by other code (report figure 6, section 3.3)."""

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops.nn import Fp8Linear, quantize_input
from tests.nn.oracle import cached, e5m6, kept_bytes, quantised, relative_rms, turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "k"), [(200, 144, 264), (128, 128, 128), (3, 8, 16)])
def test_linear_is_the_three_gemms_of_figure_6(dtype, tokens, n, k):
    torch.manual_seed(tokens)
    linear = Fp8Linear(k, n)
    x = torch.randn(tokens, k).to(dtype).requires_grad_()
    dy = torch.randn(tokens, n).to(dtype)
    y = linear(x)
    y.backward(dy)
    w = quantised(linear.weight.detach(), (128, 128), pow2=False)
    bound = 4e-4 if dtype == torch.float32 else 3e-3  # fp32 sums; bf16 adds one rounding
    assert y.dtype == dtype and relative_rms(y.detach(), cached(x.detach()) @ w.T) < bound
    assert x.grad.dtype == dtype and relative_rms(x.grad, quantised(dy, (1, 128), pow2=False) @ w) < bound
    expected = quantised(dy, (128, 1), pow2=False).T @ turned(cached(x.detach()))
    assert linear.weight.grad.dtype == torch.float32
    assert relative_rms(linear.weight.grad, expected) < 4e-4


@pytest.mark.parametrize(("cache", "bytes_per_value"), [("fp8", 1 + 4 / 128), ("e5m6", 1.5 + 4 / 128)])
def test_what_is_cached_for_wgrad(cache, bytes_per_value):
    torch.manual_seed(0)
    x, dy = torch.randn(256, 256, dtype=torch.bfloat16), torch.randn(256, 128, dtype=torch.bfloat16)
    linear = Fp8Linear(256, 128, cache=cache)
    y, size = kept_bytes(lambda: linear(x), exclude=linear.fp8_weight())
    y.backward(dy)
    assert size == x.numel() * bytes_per_value  # and so no bf16 copy
    kept = cached(x) if cache == "fp8" else e5m6(x)
    expected = quantised(dy, (128, 1), pow2=False).T @ turned(kept)
    assert relative_rms(linear.weight.grad, expected) < 4e-4


def test_the_turn_in_backward_adds_no_rounding():
    """Power-of-two scales: Wgrad gets what quantising the input itself would have given, within FP32 sums."""
    torch.manual_seed(0)
    x, dy = torch.randn(256, 256), torch.randn(256, 128)
    linear = Fp8Linear(256, 128)
    linear(x).backward(dy)
    direct = quantised(dy, (128, 1), pow2=False).T @ quantised(x, (128, 1), pow2=True)
    assert relative_rms(linear.weight.grad, direct) < 1e-6


@pytest.mark.parametrize("wanted", ["x", "weight", "both"])
def test_only_what_is_wanted_is_computed_and_kept(wanted):
    torch.manual_seed(1)
    linear = Fp8Linear(128, 64)
    x = torch.randn(40, 128)
    dy = torch.randn(40, 64)
    both = Fp8Linear(128, 64)
    both.load_state_dict(linear.state_dict())
    x_both = x.clone().requires_grad_()
    both(x_both).backward(dy)
    x.requires_grad_(wanted != "weight")
    linear.weight.requires_grad_(wanted != "x")
    y, size = kept_bytes(lambda: linear(x), exclude=linear.fp8_weight())
    y.backward(dy)
    assert size == (0 if wanted == "x" else 40 * 128 + 40 * 4)
    for got, want, name in ((x.grad, x_both.grad, "x"), (linear.weight.grad, both.weight.grad, "weight")):
        if wanted in (name, "both"):
            assert torch.equal(got, want)
        else:
            assert got is None


@pytest.mark.parametrize("cache", ["fp8", "e5m6"])
def test_evaluation_equals_training_and_keeps_nothing(cache):
    linear = Fp8Linear(128, 64, cache=cache)
    x = torch.randn(40, 128)
    y = linear(x)
    with torch.no_grad():
        z, size = kept_bytes(lambda: linear(x))
    assert torch.equal(y, z) and z.grad_fn is None and size == 0
    with torch.inference_mode():
        assert torch.equal(y, linear(x))


def test_a_shared_quantisation_is_kept_once():
    torch.manual_seed(2)
    first, second = Fp8Linear(128, 64), Fp8Linear(128, 32)
    x = torch.randn(20, 128).requires_grad_()
    (first(x).sum() + second(x).square().sum()).backward()
    alone = x.grad, first.weight.grad, second.weight.grad
    x.grad = first.weight.grad = second.weight.grad = None
    pair = quantize_input(x.detach())
    weights = (*first.fp8_weight(), *second.fp8_weight())
    ys, size = kept_bytes(lambda: (first(x, pair), second(x, pair)), exclude=weights)
    assert size == sum(t.untyped_storage().nbytes() for t in pair)
    (ys[0].sum() + ys[1].square().sum()).backward()
    for got, want in zip((x.grad, first.weight.grad, second.weight.grad), alone, strict=True):
        assert torch.equal(got, want)


def test_leading_dimensions_and_empty_input():
    linear = Fp8Linear(16, 8)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(linear(x).view(6, 8), linear(x.view(6, 16)), rtol=0, atol=0)
    empty = torch.randn(0, 16, requires_grad=True)
    linear(empty).sum().backward()
    assert empty.grad.shape == (0, 16) and not linear.weight.grad.any()


def test_double_backward_is_refused():
    linear = Fp8Linear(16, 8)
    x = torch.randn(4, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="cache: must be one of 'fp8', 'e5m6'; got 'bf16'"):
        Fp8Linear(16, 16, cache="bf16")
    with pytest.raises(ArgumentError, match="in_features: must be a multiple of 8"):
        Fp8Linear(12, 16)
    with pytest.raises(ArgumentError, match="x: last dimension must be 16"):
        Fp8Linear(16, 16)(torch.randn(2, 8))
    with pytest.raises(ArgumentError, match=r"quantized\[0\]: must have shape"):
        Fp8Linear(16, 16)(torch.randn(2, 16), quantize_input(torch.randn(3, 16)))
