"""Chunked cross entropy against a scalar definition and fp64 autograd of the unfused formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError, loss
from deepseek_ops.loss import linear_cross_entropy


def case(tokens, width, classes, seed=0, dtype=torch.float32, ignored=0.0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    h = (torch.randn(tokens, width, generator=generator) * size).to(dtype)
    weight = torch.randn(classes, width, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return h, weight, labels


def oracle(h, weight, labels):
    """Per token, in Python floats: log(sum(exp(z))) - z[label]."""
    losses = []
    for row, label in zip(h.tolist(), labels.tolist(), strict=True):
        if label == -100:
            losses.append(0.0)
            continue
        z = [math.fsum(a * b for a, b in zip(row, w, strict=True)) for w in weight.tolist()]
        top = max(z)
        losses.append(top + math.log(math.fsum(math.exp(v - top) for v in z)) - z[label])
    return losses


def gradients(h, weight, labels, upstream=None, **options):
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    value = linear_cross_entropy(h, weight, labels, **options)
    value.backward(upstream)
    return value.detach(), h.grad, weight.grad


def exact_gradients(h, weight, labels, upstream=None, reduction="sum"):
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    value = F.cross_entropy(F.linear(h, weight), labels, reduction=reduction, ignore_index=-100)
    value.backward(None if upstream is None else upstream.double())
    return value.detach(), h.grad, weight.grad


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@given(
    st.integers(0, 7), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_loss_is_the_scalar_definition(tokens, width, classes, chunk, ignored, size):
    h, weight, labels = case(tokens, width, classes, seed=tokens, ignored=ignored, size=size)
    expected = oracle(h, weight, labels)
    per_token = linear_cross_entropy(h, weight, labels, chunk=chunk, reduction="none")
    total = linear_cross_entropy(h, weight, labels, chunk=chunk)
    assert per_token.dtype == total.dtype == torch.float32 and total.shape == ()
    assert per_token.tolist() == pytest.approx(expected, rel=1e-5, abs=2e-5 * size)
    assert total.item() == pytest.approx(math.fsum(expected), rel=1e-5, abs=1e-4 * size)


@given(
    st.integers(1, 20), st.integers(1, 24), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from(["sum", "none"])
)
def test_gradients_are_those_of_the_unfused_formula(tokens, chunk, ignored, reduction):
    h, weight, labels = case(tokens, 5, 11, seed=chunk, ignored=ignored)
    upstream = torch.tensor(0.37) if reduction == "sum" else torch.linspace(-1, 2, tokens)
    ours = gradients(h, weight, labels, upstream, chunk=chunk, reduction=reduction)
    exact = exact_gradients(h, weight, labels, upstream, reduction)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (ours[1][labels == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction):
    h, weight, labels = case(6, 3, 5, ignored=0.3)
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=4, reduction=reduction), (h, weight)
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bf16_has_fp32_logits(reduction):
    """bf16 logits would be off by 2^-9 of a logit of 20 or so, 0.04 per token; ours by about 1e-4."""
    h, weight, labels = case(192, 64, 500, dtype=torch.bfloat16, size=0.7)
    upstream = None if reduction == "sum" else torch.linspace(0, 1, 192)
    ours = gradients(h, weight, labels, upstream, chunk=80, reduction=reduction)
    exact = exact_gradients(h, weight, labels, upstream, reduction)
    per_token = linear_cross_entropy(h, weight, labels, reduction="none").double()
    target = F.cross_entropy(F.linear(h.double(), weight.double()), labels, reduction="none")
    assert (per_token - target).abs().max() < 1e-3
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    assert relative(ours[0], exact[0]) < 1e-5
    assert relative(ours[1], exact[1]) < 3e-3 and relative(ours[2], exact[2]) < 3e-3


def test_bf16_weight_gradient_is_summed_in_fp32():
    """512 equal tokens in chunks of one: a bf16 running sum stalls at 2^8 times the first term."""
    h, weight, labels = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16(), torch.zeros(512).long()
    _, _, dweight = gradients(h, weight, labels, chunk=1)
    assert dweight.flatten().tolist() == [-256.0, 256.0]


def test_extreme_logits():
    h, weight = torch.tensor([[3e4], [-3e4]]), torch.tensor([[1.0], [0.0], [-1.0]])
    right, wrong = torch.tensor([0, 2]), torch.tensor([2, 0])
    assert linear_cross_entropy(h, weight, right).item() == 0
    assert linear_cross_entropy(h, weight, wrong, reduction="none").tolist() == [6e4, 6e4]
    _, dh, dweight = gradients(h, weight, wrong)
    assert dh.tolist() == [[2.0], [-2.0]] and dweight.flatten().tolist() == [6e4, 0, -6e4]


def test_the_chunk_changes_only_rounding_and_repeats_are_equal():
    h, weight, labels = case(100, 16, 40, ignored=0.2)
    first = gradients(h, weight, labels, chunk=32)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(h, weight, labels, chunk=32), strict=True))
    for chunk in (1, 99, 100, 4096):
        for a, b in zip(first, gradients(h, weight, labels, chunk=chunk), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_needed_gradients_are_made(monkeypatch):
    h, weight, labels = case(10, 4, 7)
    for reduction in ("sum", "none"):
        a = h.clone().requires_grad_()
        linear_cross_entropy(a, weight, labels, reduction=reduction).sum().backward()
        b = weight.clone().requires_grad_()
        linear_cross_entropy(h, b, labels, reduction=reduction).sum().backward()
        _, dh, dweight = exact_gradients(h, weight, labels)
        torch.testing.assert_close(a.grad.double(), dh, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.grad.double(), dweight, rtol=1e-5, atol=1e-5)
    seen = []
    real = loss._sum.kernels["reference"]
    monkeypatch.setitem(loss._sum.kernels, "reference", lambda *args: seen.append(args[4:]) or real(*args))
    with torch.no_grad():
        linear_cross_entropy(a, b, labels)
    linear_cross_entropy(a, weight, labels)
    linear_cross_entropy(a, b, labels)
    assert seen == [(False, False), (True, False), (True, True)]


def test_backward_twice_and_a_second_use():
    h, weight, labels = case(10, 4, 7)
    h.requires_grad_()
    value = linear_cross_entropy(h, weight, labels)
    (once,) = torch.autograd.grad(value, h, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * value, h)
    torch.testing.assert_close(thrice, 3 * once)


def test_non_contiguous_inputs():
    h, weight, labels = case(12, 6, 9)
    strided = h.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([labels, labels], 1)[:, 0]
    for reduction in ("sum", "none"):
        upstream = torch.ones(()) if reduction == "sum" else torch.ones(()).expand(12)
        ours = gradients(*strided, upstream, chunk=5, reduction=reduction)
        for a, b in zip(
            ours, gradients(h, weight, labels, upstream, chunk=5, reduction=reduction), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_from(tokens, dtype):
    h, weight, labels = case(tokens, 4, 7, ignored=1.1, dtype=dtype)
    for reduction, shape in (("sum", ()), ("none", (tokens,))):
        upstream = torch.ones(shape)
        value, dh, dweight = gradients(h, weight, labels, upstream, reduction=reduction)
        assert value.shape == shape and value.count_nonzero() == 0
        assert dh.shape == h.shape and dh.count_nonzero() == 0
        assert dweight.shape == weight.shape and dweight.count_nonzero() == 0


def test_one_class_has_no_loss():
    h, weight, labels = case(5, 4, 1)
    value, dh, dweight = gradients(h, weight, labels)
    assert value.item() == 0 and dh.count_nonzero() == 0 and dweight.count_nonzero() == 0


def test_opcheck():
    h, weight, labels = case(7, 4, 9, ignored=0.3)
    for op, arguments in (
        (loss._sum, (h, weight, labels, 3, True, True)),
        (loss._sum, (h.bfloat16(), weight.bfloat16(), labels, 3, True, False)),
        (loss._sum, (h, weight, labels, 3, False, False)),
        (loss._tokens, (h, weight, labels, 3)),
        (loss._tokens_backward, (torch.ones(7), h, weight, labels, 3, True, True)),
    ):
        torch.library.opcheck(op.raw, arguments)


def test_compile_fullgraph():
    _, _, labels = case(9, 4, 7, ignored=0.2)

    def function(h, weight):
        per_token = linear_cross_entropy(h.sin(), weight, labels, reduction="none")
        return linear_cross_entropy(h.cos(), weight, labels) + per_token.square().sum()

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        h, weight, _ = case(9, 4, 7)
        h.requires_grad_(), weight.requires_grad_()
        run(h, weight).backward()
        results.append((h.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -100])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("h", lambda: linear_cross_entropy(H.half(), W.half(), Y)),
        ("h", lambda: linear_cross_entropy(H[None], W, Y)),
        ("weight", lambda: linear_cross_entropy(H, W.bfloat16(), Y)),
        ("weight", lambda: linear_cross_entropy(H, W[:, :3], Y)),
        ("weight", lambda: linear_cross_entropy(H, W[:0], Y)),
        ("labels", lambda: linear_cross_entropy(H, W, Y.int())),
        ("labels", lambda: linear_cross_entropy(H, W, Y[:2])),
        ("labels", lambda: linear_cross_entropy(H, W, Y + 1)),
        ("labels", lambda: linear_cross_entropy(H, W, torch.tensor([0, -1, 0]), reduction="none")),
        ("chunk", lambda: linear_cross_entropy(H, W, Y, chunk=0)),
        ("reduction", lambda: linear_cross_entropy(H, W, Y, reduction="mean")),
    ],
)
def test_argument_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        call()
