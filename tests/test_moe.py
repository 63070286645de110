"""Routing against scalar Python and transformers; the rules that hold for every op of the family."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek_ops import ArgumentError, moe
from deepseek_ops.quantize import quantize_1x128
from deepseek_ops.reference import moe as reference

INF = float("inf")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Scalar oracles: the report's sentences, one loop each.


def oracle_choice(choice, top_k, num_groups, top_groups):
    """Experts of one token from its biased scores (a list of floats)."""
    size = len(choice) // num_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(num_groups)]
    score = [torch.tensor(sorted(group)[-2:], dtype=torch.float32).sum().item() for group in groups]
    opened = sorted(range(num_groups), key=lambda g: (-score[g], g))[:top_groups]
    allowed = [i for i in range(len(choice)) if i // size in opened]
    return sorted(allowed, key=lambda i: (-choice[i], i))[:top_k]


@st.composite
def routings(draw):
    num_groups = draw(st.sampled_from([1, 2, 3, 4]))
    size = draw(st.integers(1, 5))
    top_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(8, top_groups * size)))
    seed, tokens = draw(st.integers(0, 999)), draw(st.integers(0, 9))
    logits = torch.randn(tokens, num_groups * size, generator=generator(seed)) * draw(
        st.sampled_from([0.1, 1, 8])
    )
    bias = torch.randn(num_groups * size, generator=generator(seed + 1)) * draw(st.sampled_from([0, 0.3]))
    if draw(st.booleans()):  # many ties, of experts and of groups
        logits, bias = logits.round(), bias.round()
    return logits, bias, {"top_k": top_k, "num_groups": num_groups, "top_groups": top_groups}


@given(routings(), st.booleans())
def test_route_is_the_scalar_definition(backend_name, case, normalize):
    logits, bias, options = case
    topk_idx, weight, scores, counts = moe.route(logits, bias, scale=2.5, normalize=normalize, **options)
    exact = logits.double().sigmoid()
    assert ((scores.double() - exact).abs() <= 4 * 2.0**-24 * exact).all()
    choice = (scores + bias).tolist()
    assert topk_idx.tolist() == [oracle_choice(row, **options) for row in choice]
    for t, chosen in enumerate(topk_idx.tolist()):
        picked = [scores[t, i].item() for i in chosen]
        total = math.fsum(picked) if normalize else 1.0
        expected = [2.5 * value / (total + 1e-20) if normalize else 2.5 * value for value in picked]
        assert weight[t].tolist() == pytest.approx(expected, rel=1e-6)
    assert counts.tolist() == [int((topk_idx == e).sum()) for e in range(logits.shape[1])]
    assert (topk_idx.dtype, weight.dtype, counts.dtype) == (torch.int64, torch.float32, torch.int64)


def test_the_reference_scores_with_torch():
    logits = torch.randn(50, 12, generator=generator(6)) * 4
    assert torch.equal(moe.route(logits, torch.zeros(12), top_k=1)[2], logits.sigmoid())


def test_route_ties_go_to_the_lowest_index(backend_name):
    options = {"top_k": 5, "num_groups": 4, "top_groups": 2}
    topk_idx = moe.route(torch.zeros(3, 16), torch.zeros(16), **options)[0]
    assert topk_idx.tolist() == [[0, 1, 2, 3, 4]] * 3
    bias = torch.zeros(16)
    bias[[7, 9, 14]] = 0.5  # groups 1, 2 and 3 tie with score 0.5 + 1.0; 1 and 2 win
    assert moe.route(torch.zeros(1, 16), bias, **options)[0].tolist() == [[7, 9, 4, 5, 6]]
    wide = moe.route(torch.zeros(2, 256), torch.zeros(256), top_k=8, num_groups=8, top_groups=4)[0]
    assert wide.tolist() == [list(range(8))] * 2


def test_route_group_score_is_the_sum_of_the_best_two(backend_name):
    logits = torch.tensor([[9.0, -9, -9, 2, 2, -9]])  # best single expert in group 0, best pair in group 1
    assert moe.route(logits, torch.zeros(6), top_k=2, num_groups=2, top_groups=1)[0].tolist() == [[3, 4]]
    # the pair counts with its bias, the third best does not
    logits = torch.tensor([[0.0, 0, -9, 0.1, 0.1, 0.1]])
    bias = torch.tensor([0.1, 0.1, 0, 0, 0, 0])
    assert moe.route(logits, bias, top_k=1, num_groups=2, top_groups=1)[0].tolist() == [[0]]


def test_route_orders_negative_and_infinite_biases(backend_name):
    bias = torch.tensor([-3.0, -2, -INF, -2, -5, -4])
    assert moe.route(torch.zeros(1, 6), bias, top_k=6)[0].tolist() == [[1, 3, 0, 5, 4, 2]]


def test_route_survives_nan(backend_name):
    logits = torch.randn(4, 16, generator=generator(0))
    logits[1, 5], logits[2], logits[3, 0] = float("nan"), float("nan"), -INF
    topk_idx, weight, _, counts = moe.route(logits, torch.zeros(16), top_k=4, num_groups=4, top_groups=2)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in topk_idx.tolist())
    assert counts.sum() == 16 and weight[2].isnan().all() and weight[[0, 3]].isfinite().all()


def transformers_router(experts, groups, top_groups, top_k, scale, normalize):
    config = SimpleNamespace(
        num_experts_per_tok=top_k, num_local_experts=experts, hidden_size=experts, routed_scaling_factor=scale
    )
    config.n_group, config.topk_group, config.norm_topk_prob = groups, top_groups, normalize
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.eye(experts)  # logits = input
    return router


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k"),
    [(16, 4, 2, 4), (256, 8, 4, 8), (8, 1, 1, 3), (12, 3, 3, 12)],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_route_matches_transformers(backend_name, experts, groups, top_groups, top_k, normalize):
    router = transformers_router(experts, groups, top_groups, top_k, 2.5, normalize)
    logits = torch.randn(64, experts, generator=generator(1))
    bias = torch.randn(experts, generator=generator(2)) * 0.1
    router.e_score_correction_bias.copy_(bias)
    grad = torch.randn(64, experts, generator=generator(3))

    theirs_in, ours_in = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    _, their_weight, their_idx = router(theirs_in)
    options = {
        "top_k": top_k,
        "num_groups": groups,
        "top_groups": top_groups,
        "scale": 2.5,
        "normalize": normalize,
    }
    topk_idx, weight, _, _ = moe.route(ours_in, bias, **options)
    order = their_idx.argsort(1), topk_idx.argsort(1)
    assert torch.equal(their_idx.gather(1, order[0]), topk_idx.gather(1, order[1]))
    torch.testing.assert_close(
        weight.gather(1, order[1]), their_weight.gather(1, order[0]), rtol=1e-6, atol=0
    )
    # the same upstream gradient per (token, expert)
    (weight * grad.gather(1, topk_idx)).sum().backward()
    (their_weight * grad.gather(1, their_idx)).sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
def test_route_gradient(normalize):
    logits = torch.randn(5, 12, dtype=torch.float64, generator=generator(4)).requires_grad_()
    bias = torch.randn(12, dtype=torch.float64, generator=generator(5)).requires_grad_()

    def weight_and_scores(logits):
        return moe.route(
            logits, bias.detach(), top_k=4, num_groups=3, top_groups=2, scale=1.7, normalize=normalize
        )[1:3]

    assert torch.autograd.gradcheck(weight_and_scores, (logits,))
    _, weight, scores, _ = moe.route(logits, bias, top_k=4, scale=1.7, normalize=normalize)
    (weight.square().sum() + scores.sum()).backward()
    assert bias.grad is None and logits.grad.count_nonzero() == logits.numel()


@pytest.mark.parametrize("normalize", [True, False])
def test_route_gradient_in_fp32(backend_name, normalize):
    """Against fp64 autograd of the plain formula, on the experts that were chosen."""
    logits = (torch.randn(9, 48, generator=generator(20)) * 2).requires_grad_()
    dweight = torch.randn(9, 6, generator=generator(21))
    dscores = torch.randn(9, 48, generator=generator(22))
    topk_idx, weight, scores, _ = moe.route(
        logits, torch.zeros(48), top_k=6, num_groups=4, top_groups=2, scale=2.5, normalize=normalize
    )
    torch.autograd.backward((weight, scores), (dweight, dscores))

    wide = logits.detach().double().requires_grad_()
    plain = wide.sigmoid()
    chosen = plain.gather(1, topk_idx)
    wide_weight = 2.5 * chosen / (chosen.sum(1, keepdim=True) if normalize else 1)
    torch.autograd.backward((wide_weight, plain), (dweight.double(), dscores.double()))
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_route_without_one_of_its_gradients(backend_name):
    """Only the weights, or only the scores, reach the loss: the other gradient is zeros."""
    logits = torch.randn(5, 16, generator=generator(23))
    grads = []
    for pick in ([1], [2], [1, 2]):
        x = logits.clone().requires_grad_()
        outputs = moe.route(x, torch.zeros(16), top_k=3)
        sum(outputs[i].square().sum() for i in pick).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-5, atol=1e-6)


# The library's own rules


def test_empty_inputs(backend_name):
    logits, bias = torch.zeros(0, 8, requires_grad=True), torch.zeros(8)
    topk_idx, weight, scores, counts = moe.route(logits, bias, top_k=2, num_groups=4, top_groups=2)
    assert topk_idx.shape == weight.shape == (0, 2) and scores.shape == (0, 8) and counts.tolist() == [0] * 8
    x, cu = torch.zeros(0, 3, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    x_perm, offsets, source = moe.permute(x, topk_idx, 8)
    out = moe.unpermute(x_perm, source, 0, 2, weight)
    assert x_perm.shape == out.shape == (0, 3) and offsets.tolist() == [0] * 9
    loss = moe.balance_loss(scores, topk_idx, cu, alpha=1.0)
    (out.sum() + loss).backward()
    assert loss.item() == 0 and x.grad.shape == (0, 3) and logits.grad.shape == (0, 8)
    assert moe.unpermute(torch.zeros(4, 0), torch.arange(4), 2, 2, torch.ones(2, 2)).shape == (2, 0)


def test_one_expert(backend_name):
    topk_idx, weight, _, counts = moe.route(torch.randn(3, 1), torch.zeros(1), top_k=1, scale=2.0)
    assert (
        topk_idx.tolist() == [[0]] * 3 and counts.tolist() == [3] and weight.flatten().tolist() == [2.0] * 3
    )
    x = torch.randn(3, 2)
    x_perm, offsets, source = moe.permute(x, topk_idx, 1)
    assert torch.equal(x_perm, x) and offsets.tolist() == [0, 3] and source.tolist() == [0, 1, 2]


def test_non_contiguous_inputs(backend_name):
    logits = torch.randn(16, 24, generator=generator(13)).t()
    bias = torch.randn(16, 2, generator=generator(14))[:, 0]
    options = {"top_k": 4, "num_groups": 4, "top_groups": 2}
    ours, plain = (
        moe.route(logits, bias, **options),
        moe.route(logits.contiguous(), bias.contiguous(), **options),
    )
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(ours, plain, strict=True))
    topk_idx, weights = ours[0].t().contiguous().t(), ours[1].t().contiguous().t()
    x = torch.randn(40, 24, generator=generator(15)).t()
    a, b = moe.permute(x, topk_idx, 16), moe.permute(x.contiguous(), plain[0], 16)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    y = a[0].t().contiguous().t().requires_grad_()
    out = moe.unpermute(y, a[2], 24, 4, weights)
    assert torch.equal(out, moe.unpermute(b[0], b[2], 24, 4, plain[1]))
    out.sum().backward()  # an expanded gradient
    torch.testing.assert_close(y.grad, plain[1].flatten()[a[2], None].expand(96, 40))


def test_opcheck(backend_name):
    logits, bias = torch.randn(6, 8), torch.randn(8)
    topk_idx, weight, scores, counts = moe.route(logits, bias, top_k=2)
    x = torch.randn(6, 5)
    x_perm, _, source = moe.permute(x, topk_idx, 8)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    for op, arguments in (
        (moe._route, (logits, bias, 2, 4, 2, 2.5, True)),
        (moe._route_backward, (weight, scores, scores, topk_idx, 2.5, True)),
        (moe._balance_loss, (scores, topk_idx, cu, 0.1, "unbiased")),
        (moe._update_bias_, (bias.clone(), counts, 0.1)),
        (moe._permute, (x, topk_idx, 8)),
        (moe._unpermute, (x_perm, source, 6, 2, weight)),
        (moe._unpermute, (x_perm, source, 6, 2, None)),
        (moe._unpermute_backward, (x, x_perm, source, 2, weight)),
        (moe._unpermute_backward, (x, None, source, 2, None)),
    ):
        torch.library.opcheck(op.raw, arguments)
    # opcheck's own comparison of inputs before and after does not exist for fp8
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*quantize_1x128(x), topk_idx, 8)
    torch.library.opcheck(moe._permute_quantized.raw, arguments, test_utils=tests)


def test_compile_fullgraph(backend_name):
    def layer(x, gate, bias):
        topk_idx, weight, scores, counts = moe.route(
            x @ gate, bias, top_k=2, num_groups=4, top_groups=2, scale=2.5
        )
        cu = torch.tensor([0, 3, x.shape[0]], dtype=torch.int32)
        loss = moe.balance_loss(scores, topk_idx, cu, alpha=0.1)
        x_perm, _, source = moe.permute(x, topk_idx, 8)
        out = moe.unpermute(x_perm.tanh(), source, x.shape[0], 2, weight)
        moe.update_bias_(bias, counts, speed=0.01)
        return out.square().sum() + loss

    x, gate = torch.randn(7, 5, generator=generator(16)), torch.randn(5, 8, generator=generator(17))
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        a, b, bias = x.clone().requires_grad_(), gate.clone().requires_grad_(), torch.zeros(8)
        loss = function(a, b, bias)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad, bias))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


L, B, I2 = torch.zeros(4, 8), torch.zeros(8), torch.zeros(4, 2, dtype=torch.int64)
CU, X, S = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(4, 3), torch.arange(8)
COUNTS = torch.ones(8, dtype=torch.int64)
Q, QS = quantize_1x128(X)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("logits", lambda: moe.route(L.bfloat16(), B, top_k=1)),
        ("logits", lambda: moe.route(L[0], B, top_k=1)),
        ("logits", lambda: moe.route(L[:, :0], B[:0], top_k=1)),
        ("bias", lambda: moe.route(L, B.bfloat16(), top_k=1)),
        ("bias", lambda: moe.route(L, B[:7], top_k=1)),
        ("num_groups", lambda: moe.route(L, B, top_k=1, num_groups=3)),
        ("num_groups", lambda: moe.route(L, B, top_k=1, num_groups=0)),
        ("top_groups", lambda: moe.route(L, B, top_k=1, num_groups=4, top_groups=5)),
        ("top_k", lambda: moe.route(L, B, top_k=5, num_groups=4, top_groups=2)),
        ("top_k", lambda: moe.route(L, B, top_k=0)),
        ("scores", lambda: moe.balance_loss(L.half(), I2, CU, alpha=1)),
        ("topk_idx", lambda: moe.balance_loss(L, I2.int(), CU, alpha=1)),
        ("topk_idx", lambda: moe.balance_loss(L, I2[:3], CU, alpha=1)),
        ("topk_idx", lambda: moe.balance_loss(L, I2[:, :0], CU, alpha=1)),
        ("cu_seqlens", lambda: moe.balance_loss(L, I2, CU.long(), alpha=1)),
        ("cu_seqlens", lambda: moe.balance_loss(L, I2, CU[:0], alpha=1)),
        ("alpha", lambda: moe.balance_loss(L, I2, CU, alpha=float("nan"))),
        ("selection", lambda: moe.balance_loss(L, I2, CU, alpha=1, selection="both")),
        ("bias", lambda: moe.update_bias_(B.bfloat16(), COUNTS, speed=1)),
        ("bias", lambda: moe.update_bias_(torch.zeros(8, requires_grad=True), COUNTS, speed=1)),
        ("counts", lambda: moe.update_bias_(B, COUNTS.float(), speed=1)),
        ("counts", lambda: moe.update_bias_(B, COUNTS[:7], speed=1)),
        ("speed", lambda: moe.update_bias_(B, COUNTS, speed=-1)),
        ("counts", lambda: moe.max_violation(COUNTS.float())),
        ("counts", lambda: moe.max_violation(COUNTS[:0])),
        ("x", lambda: moe.permute(X.half(), I2, 2)),
        ("topk_idx", lambda: moe.permute(X, I2.int(), 2)),
        ("topk_idx", lambda: moe.permute(X, I2[:3], 2)),
        ("topk_idx", lambda: moe.permute(X, I2[:, :0], 2)),
        ("num_experts", lambda: moe.permute(X, I2, 0)),
        ("q", lambda: moe.permute_quantized(X, QS, I2, 2)),
        ("scale", lambda: moe.permute_quantized(Q, QS[:, :3], I2, 2)),
        ("scale", lambda: moe.permute_quantized(Q, QS.double(), I2, 2)),
        ("topk_idx", lambda: moe.permute_quantized(Q, QS, I2[:3], 2)),
        ("num_experts", lambda: moe.permute_quantized(Q, QS, I2, 0)),
        ("y", lambda: moe.unpermute(X, S, 4, 2)),
        ("y", lambda: moe.unpermute(X[0], S, 4, 2)),
        ("num_tokens", lambda: moe.unpermute(X, S, -1, 2)),
        ("top_k", lambda: moe.unpermute(X, S, 4, 0)),
        ("source", lambda: moe.unpermute(X, S, 2, 2)),
        ("source", lambda: moe.unpermute(X, S[:4].int(), 2, 2)),
        ("weights", lambda: moe.unpermute(X, S[:4], 2, 2, torch.ones(2, 2).bfloat16())),
        ("weights", lambda: moe.unpermute(X, S[:4], 2, 2, torch.ones(4))),
    ],
)
def test_argument_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        call()


@given(
    seed=st.integers(0, 50),
    groups=st.sampled_from([(1, 1), (4, 2), (4, 4), (16, 3)]),
    levels=st.sampled_from([3, 50]),
)
def test_few_tokens_choose_as_many_do(seed, groups, levels):
    """Sorts and keys order alike, ties included (few levels make many)."""
    g = torch.Generator().manual_seed(seed)
    biased = torch.randint(0, levels, (20, 16), generator=g) / levels
    num_groups, top_groups = groups
    want = reference.choose(biased, 3, num_groups, top_groups)
    assert torch.equal(reference.choose_few_(biased.clone(), 3, num_groups, top_groups), want)


def test_few_and_many_tokens_order_nan_of_either_sign_alike():
    """Both ways of choosing put NaN on top, lowest index first, and never choose from a closed group."""
    biased = torch.rand(reference.FEW_SCORES // 16 + 1, 16, generator=torch.Generator().manual_seed(0))
    negative = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    biased[::3, 9], biased[::5, 2], biased[1::3, 14] = negative, float("nan"), negative
    assert bool(torch.signbit(negative)) and negative.isnan()
    many = reference.choose(biased.clone(), 3, 4, 2)
    few = reference.choose_few_(biased.clone(), 3, 4, 2)
    assert torch.equal(many, few)
    assert (many[::3] == 9).any(1).all() and many[0, 0] == 2
