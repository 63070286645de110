"""The sequence-wise balance loss, the bias rule and MaxVio against their equations, in scalar Python."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepseek_ops
from deepseek_ops import moe


def generator(seed):
    return torch.Generator().manual_seed(seed)


def oracle_balance(scores, topk_idx, cu_seqlens, alpha, selection):
    experts, k, losses = scores.shape[1], topk_idx.shape[1], []
    scores, topk_idx = scores.tolist(), topk_idx.tolist()
    for start, end in itertools.pairwise(cu_seqlens):
        if start == end:
            continue
        count, mean = [0] * experts, [0.0] * experts
        for t in range(start, end):
            row = scores[t]
            chosen = (
                topk_idx[t]
                if selection == "biased"
                else sorted(range(experts), key=lambda i: (-row[i], i))[:k]
            )
            for i in chosen:
                count[i] += 1
            for i in range(experts):
                mean[i] += row[i] / sum(row) / (end - start)
        losses.append(
            alpha * sum(experts / (k * (end - start)) * c * p for c, p in zip(count, mean, strict=True))
        )
    return sum(losses) / len(losses) if losses else 0.0


@st.composite
def sequences(draw):
    lengths = draw(st.lists(st.integers(0, 6), min_size=0, max_size=5))
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    padding, experts = draw(st.integers(0, 3)), draw(st.integers(1, 8))
    return cu, cu[-1] + padding, experts, draw(st.integers(1, experts)), draw(st.integers(0, 999))


@given(sequences(), st.sampled_from(["biased", "unbiased"]))
def test_balance_loss_is_equation_17_per_sequence(case, selection):
    cu, tokens, experts, top_k, seed = case
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=generator(seed))
    bias = torch.randn(experts, dtype=torch.float64, generator=generator(seed + 1))
    topk_idx, _, scores, _ = moe.route(logits, bias, top_k=top_k)
    cu_seqlens = torch.tensor(cu, dtype=torch.int32)
    loss = moe.balance_loss(scores, topk_idx, cu_seqlens, alpha=0.3, selection=selection)
    assert loss.item() == pytest.approx(oracle_balance(scores, topk_idx, cu, 0.3, selection), rel=1e-12)
    assert loss.shape == ()


@given(sequences(), st.sampled_from(["biased", "unbiased"]))
def test_balance_loss_in_fp32(backend_name, case, selection):
    cu, tokens, experts, top_k, seed = case
    scores = torch.rand(tokens, experts, generator=generator(seed)) + 0.01
    topk_idx = torch.rand(tokens, experts, generator=generator(seed + 1)).argsort(1)[:, :top_k]
    scores.requires_grad_()
    cu_seqlens = torch.tensor(cu, dtype=torch.int32)
    loss = moe.balance_loss(scores, topk_idx, cu_seqlens, alpha=0.3, selection=selection)
    exact = oracle_balance(scores.detach(), topk_idx, cu, 0.3, selection)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=2e-6)
    loss.backward()
    wide = scores.detach().double().requires_grad_()
    with deepseek_ops.backend("reference"):
        moe.balance_loss(wide, topk_idx, cu_seqlens, alpha=0.3, selection=selection).backward()
    size = wide.grad.abs().max().item() if tokens else 0.0
    torch.testing.assert_close(scores.grad.double(), wide.grad, rtol=1e-5, atol=1e-5 * size + 1e-7)
    assert (scores.grad[cu[-1] :] == 0).all()


def test_balance_loss_counts_no_padding_not_even_nan(backend_name):
    """Tokens before the first border and past the last one."""
    scores = torch.rand(9, 5, generator=generator(8))
    topk_idx = scores.topk(2).indices
    cu = torch.tensor([2, 4, 4, 7], dtype=torch.int32)
    alone = moe.balance_loss(scores[2:7], topk_idx[2:7], cu - 2, alpha=1.0)
    assert moe.balance_loss(scores, topk_idx, cu, alpha=1.0).item() == pytest.approx(alone.item(), rel=1e-6)


def test_balance_loss_gradient_flows_through_p_alone():
    scores = torch.rand(11, 6, dtype=torch.float64, generator=generator(7)).requires_grad_()
    topk_idx = scores.detach().topk(2).indices
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)  # an empty sequence; two tokens of padding
    assert torch.autograd.gradcheck(lambda s: moe.balance_loss(s, topk_idx, cu, alpha=0.7), (scores,))
    (3 * moe.balance_loss(scores, topk_idx, cu, alpha=0.7)).backward()

    plain = scores.detach().clone().requires_grad_()
    share, loss = plain / plain.sum(-1, keepdim=True), 0.0
    for a, b in ((0, 4), (4, 9)):
        frequency = torch.nn.functional.one_hot(topk_idx[a:b], 6).double().sum((0, 1)) * 6 / (2 * (b - a))
        loss = loss + 0.7 * (frequency * share[a:b].mean(0)).sum() / 2
    (3 * loss).backward()
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=1e-15)
    assert (scores.grad[9:] == 0).all()


def test_balance_loss_of_perfect_balance_is_alpha_and_of_collapse_is_e_over_k_times_alpha(backend_name):
    cu = torch.tensor([0, 8], dtype=torch.int32)
    even = torch.arange(8)[:, None] % 4
    loss = moe.balance_loss(torch.ones(8, 4), even, cu, alpha=0.01)
    assert loss.item() == pytest.approx(0.01, rel=1e-6) and loss.dtype == torch.float32
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    assert moe.balance_loss(collapsed, even * 0, cu, alpha=0.01).item() == pytest.approx(0.04, rel=1e-6)


def test_balance_loss_selections_differ_when_the_bias_does(backend_name):
    scores = torch.tensor([[0.9, 0.1]]).expand(4, 2)
    cu, biased = torch.tensor([0, 4], dtype=torch.int32), torch.ones(4, 1, dtype=torch.int64)
    assert moe.balance_loss(scores, biased, cu, alpha=1).item() == pytest.approx(0.2)
    assert moe.balance_loss(scores, biased, cu, alpha=1, selection="unbiased").item() == pytest.approx(1.8)


# update_bias_ and max_violation


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=40), st.sampled_from([0.0, 0.001, 0.5]))
def test_update_bias_is_exact_in_integers(backend_name, counts, speed):
    bias = torch.linspace(-1, 1, len(counts))
    expected = []
    for old, count in zip(bias, counts, strict=True):
        difference = sum(counts) - len(counts) * count  # Python integers
        expected.append(old + torch.tensor(speed) * ((difference > 0) - (difference < 0)))
    result = moe.update_bias_(bias, torch.tensor(counts), speed=speed)
    assert result is bias and torch.equal(bias, torch.stack(expected))


def test_update_bias_sees_one_token_in_2_to_the_50(backend_name):
    big = 2**50
    bias = torch.zeros(4)
    moe.update_bias_(bias, torch.tensor([big, big, big, big]), speed=0.001)
    assert bias.tolist() == [0.0] * 4
    moe.update_bias_(bias, torch.tensor([big, big + 1, big, big - 1]), speed=0.25)
    assert bias.tolist() == [0.0, -0.25, 0.0, 0.25]


def test_max_violation():
    assert moe.max_violation(torch.tensor([4, 4, 4, 4])).item() == 0
    assert moe.max_violation(torch.tensor([[8, 0, 0, 0], [6, 4, 4, 2], [0, 0, 0, 0]])).tolist() == [
        3.0,
        0.5,
        0.0,
    ]
    assert moe.max_violation(torch.tensor([2**50, 0])).item() == 1.0
