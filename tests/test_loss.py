"""Chunked cross entropy against a scalar definition and fp64 autograd of the unfused formula."""

import contextlib
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import deepseek_ops
from deepseek_ops import ArgumentError, _registry, loss
from deepseek_ops._emulation import ASYNCHRONY, SCHEDULES
from deepseek_ops.loss import linear_cross_entropy
from deepseek_ops.reference.modelled.loss import classes_of_chunk


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
    check_scalar_definition(tokens, width, classes, chunk, ignored, size, torch.float32)


@given(
    st.integers(0, 7), st.integers(1, 6), st.sampled_from([1, 9, 300]), st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_loss_of_bf16_is_the_scalar_definition(backend_name, tokens, width, classes, chunk, ignored, size):
    check_scalar_definition(tokens, width, classes, chunk, ignored, size, torch.bfloat16)


def check_scalar_definition(tokens, width, classes, chunk, ignored, size, dtype):
    h, weight, labels = case(tokens, width, classes, seed=tokens, ignored=ignored, size=size, dtype=dtype)
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


@pytest.mark.parametrize("chunk", [1, 16, 24])
@pytest.mark.parametrize("classes", [11, 600])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_of_bf16(classes, chunk, reduction, backend_name):
    """Several chunks of tokens, or of the vocabulary (600 classes are three of 256)."""
    tokens = 20
    h, weight, labels = case(tokens, 24, classes, seed=chunk, ignored=0.3, dtype=torch.bfloat16, size=0.3)
    upstream = torch.tensor(0.37) if reduction == "sum" else torch.linspace(-1, 2, tokens)
    ours = gradients(h, weight, labels, upstream, chunk=chunk, reduction=reduction)
    exact = exact_gradients(h, weight, labels, upstream, reduction)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=2e-5)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16 and relative(a, b) < 6e-3
    assert (ours[1][labels == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction):
    h, weight, labels = case(6, 3, 5, ignored=0.3)
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=4, reduction=reduction), (h, weight)
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bf16_has_fp32_logits(reduction, backend_name):
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


def test_bf16_weight_gradient_is_summed_in_fp32(backend_name):
    """512 equal tokens in chunks of one: a bf16 running sum stalls at 2^8 times the first term."""
    h, weight, labels = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16(), torch.zeros(512).long()
    _, _, dweight = gradients(h, weight, labels, chunk=1)
    assert dweight.flatten().tolist() == [-256.0, 256.0]


@pytest.mark.parametrize("size", [3e4, 2.0**125], ids=["large", "near the end of fp32"])
def test_extreme_logits(size):
    check_extreme_logits(torch.tensor([[size], [-size]]))


@pytest.mark.parametrize("size", [2.0**15, 2.0**125], ids=["large", "near the end of fp32"])
def test_extreme_logits_of_bf16(size, backend_name):
    check_extreme_logits(torch.tensor([[size], [-size]]).bfloat16())


def check_extreme_logits(h):
    size, weight = h[0].item(), torch.tensor([[1.0], [0.0], [-1.0]]).to(h.dtype)
    right, wrong = torch.tensor([0, 2]), torch.tensor([2, 0])
    assert linear_cross_entropy(h, weight, right).item() == 0
    assert linear_cross_entropy(h, weight, wrong, reduction="none").tolist() == [2 * size, 2 * size]
    _, dh, dweight = gradients(h, weight, wrong)
    assert dh.tolist() == [[2.0], [-2.0]] and dweight.flatten().tolist() == [2 * size, 0, -2 * size]


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
    check_non_contiguous_inputs(torch.float32)


def test_non_contiguous_inputs_of_bf16(backend_name):
    check_non_contiguous_inputs(torch.bfloat16)


def check_non_contiguous_inputs(dtype):
    h, weight, labels = case(12, 6, 9, dtype=dtype)
    strided = h.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([labels, labels], 1)[:, 0]
    for reduction in ("sum", "none"):
        upstream = torch.ones(()) if reduction == "sum" else torch.ones(()).expand(12)
        ours = gradients(*strided, upstream, chunk=5, reduction=reduction)
        for a, b in zip(
            ours, gradients(h, weight, labels, upstream, chunk=5, reduction=reduction), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_from(tokens):
    check_nothing_to_learn_from(tokens, torch.float32)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_from_in_bf16(tokens, backend_name):
    check_nothing_to_learn_from(tokens, torch.bfloat16)


def check_nothing_to_learn_from(tokens, dtype):
    h, weight, labels = case(tokens, 4, 7, ignored=1.1, dtype=dtype)
    for reduction, shape in (("sum", ()), ("none", (tokens,))):
        upstream = torch.ones(shape)
        value, dh, dweight = gradients(h, weight, labels, upstream, reduction=reduction)
        assert value.shape == shape and value.count_nonzero() == 0
        assert dh.shape == h.shape and dh.count_nonzero() == 0
        assert dweight.shape == weight.shape and dweight.count_nonzero() == 0


def test_one_class_has_no_loss(backend_name):
    h, weight, labels = case(5, 4, 1, dtype=torch.bfloat16)
    value, dh, dweight = gradients(h, weight, labels)
    assert value.item() == 0 and dh.count_nonzero() == 0 and dweight.count_nonzero() == 0


KERNELS = [name for name in ("emulated", "checked") if not _registry.absent_reason(name)]


@pytest.mark.parametrize("seed", range(12))
def test_kernels_have_the_modelled_bits(seed):
    """Every op, several chunks of the vocabulary, labels and strides of any kind, any schedule."""
    draw = random.Random(seed)
    tokens, width = draw.choice([1, 7, 9, 33, 65]), draw.choice([5, 8, 72])
    classes, chunk = draw.choice([7, 256, 300, 601]), draw.choice([1, 3, 20, 64])
    h, weight, labels = case(
        tokens, width, classes, seed=seed, dtype=torch.bfloat16, ignored=draw.choice([0, 0.5])
    )
    if draw.random() < 0.5:
        h, weight = h.t().contiguous().t(), weight.t().contiguous().t()
    labels, dloss = torch.stack([labels, labels], 1)[:, 0], torch.randn(1).expand(tokens)
    need = draw.random() < 0.7, draw.random() < 0.7

    def run():
        total = loss._sum.plain(h, weight, labels, chunk, *need)
        per_token = loss._tokens.plain(h, weight, labels, chunk)
        return *total, per_token, *loss._tokens_backward.plain(dloss, h, weight, labels, chunk, *need)

    with deepseek_ops.backend("modelled"):
        want = run()
    if not KERNELS:
        pytest.skip(f"backend emulated: {_registry.absent_reason('emulated')}")
    for target in KERNELS[: 1 if seed % 4 else 2]:
        options = {"asynchrony": ASYNCHRONY[seed % 3], "schedule": SCHEDULES[seed % 4]}
        with deepseek_ops.backend(target), deepseek_ops.emulation(seed=seed, **options):
            got = run()
        for x, y in zip(got, want, strict=True):
            assert x.shape == y.shape and same_bits(x, y)


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(
        x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)
    )


@pytest.mark.skipif("checked" not in KERNELS, reason="backend checked is absent")
def test_no_step_of_the_kernels_can_be_left_out():
    """Barriers and shuffles of the scan and of the sum: without one, a report or other bits."""
    h, weight, labels = case(20, 8, 300, dtype=torch.bfloat16)

    def run(op):
        return (
            loss._tokens.plain(h, weight, labels, 5)
            if op == "scan"
            else loss._sum.plain(h, weight, labels, 5, False, False)[0]
        )

    tried = []
    with deepseek_ops.backend("checked"):
        for op in ("scan", "sum"):
            want = run(op)
            sites = [
                site for site in deepseek_ops.drop_sites() if not site.kind.startswith("grid_dependency")
            ]
            for site in sites:
                tried.append((op, site.kind))
                dropped = deepseek_ops.emulation(drop=(site.kind, site.site))
                with dropped, contextlib.suppress(deepseek_ops.KernelError):
                    assert not same_bits(run(op), want), site
    assert ("scan", "barrier_sync") in tried and ("sum", "barrier_sync") in tried


@pytest.mark.parametrize("target", KERNELS)
def test_labels_that_are_no_class_harm_nobody_else(target):
    """The device cannot raise an error: such a token's loss is NaN, every other one stays as it is."""
    h, weight, labels = case(9, 8, 300, dtype=torch.bfloat16)
    wrong = labels.clone()
    wrong[2], wrong[5], wrong[7] = 300, -1, 2**62
    with deepseek_ops.backend(target):
        right = linear_cross_entropy(h, weight, labels, chunk=3, reduction="none")
        per_token = linear_cross_entropy(h, weight, wrong, chunk=3, reduction="none")
        value, dh, _ = gradients(h, weight, wrong, chunk=3)
    rest = [0, 1, 3, 4, 6, 8]
    assert per_token[[2, 5, 7]].isnan().all() and torch.equal(per_token[rest], right[rest])
    assert value.isnan() and torch.equal(dh[rest], gradients_of(h, weight, labels, target)[rest])


def gradients_of(h, weight, labels, target):
    with deepseek_ops.backend(target):
        return gradients(h, weight, labels, chunk=3)[1]


@pytest.mark.parametrize("target", KERNELS)
def test_kernels_name_the_dtype_that_they_do_not_take(target):
    h, weight, labels = case(3, 4, 5)
    with deepseek_ops.backend(target):
        for reduction in ("sum", "none"):
            with pytest.raises(ArgumentError, match=r'^h: must be bfloat16.*"reference".*; got float32'):
                linear_cross_entropy(h, weight, labels, reduction=reduction)


def test_the_workspace_holds_the_logits_of_a_chunk_of_tokens():
    for tokens, classes, chunk in (
        (4096, 129280, 256),
        (16384, 129280, 256),
        (100, 129280, 256),
        (7, 11, 3),
        (0, 5, 1),
    ):
        size = classes_of_chunk(tokens, classes, chunk)
        assert size % 8 == 0 and (size % 256 == 0 or size >= classes)
        assert size >= min(classes, 256) and (
            size == 256 or tokens * size <= max(chunk, tokens) * (classes + 7)
        )
        assert size == 256 or size >= classes or tokens * size <= chunk * classes


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
