"""GRPO's equations against plain loops over numbers: advantages, clip, KL, every normalisation, gradients by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from deepseek_ops.loss import linear_cross_entropy
from examples.configs.post_training import GrpoConfig
from examples.errors import UserError
from examples.train.grpo import NORMALIZATIONS, advantages, normalization, policy_loss, token_weights

LOW, HIGH, BETA, LIMIT = 0.2, 0.3, 0.05, 9
OPTIONS = {"clip_low": LOW, "clip_high": HIGH, "beta": BETA}


def test_advantages_are_the_groups_own_and_zero_without_variance():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, 0.0, 0.0, 0.0]]).double()
    value, same = advantages(rewards)
    assert same.tolist() == [False, True, False]
    assert value[0].tolist() == [1, -1, -1, 1]
    assert value[1].tolist() == [0, 0, 0, 0]  # 0.1 three times has a mean that rounds: exactly 0 all the same
    assert value[2].tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert advantages(rewards, by_std=False)[0][2].tolist() == pytest.approx([2.25, -0.75, -0.75, -0.75])
    for bad in (torch.zeros(4), torch.zeros(3, 1), torch.tensor([[1.0, math.nan]])):
        with pytest.raises(UserError, match="rewards: must be"):
            advantages(bad)


def case(seed=0):
    """Outputs of 1 to 9 tokens of two questions, some far enough from the old policy to be clipped on either side."""
    rng = np.random.default_rng(seed)
    lengths = [3, 9, 1, 5, 2, 4]
    output = np.repeat(np.arange(6), lengths)
    total = sum(lengths)
    weight, hidden = rng.normal(size=(11, 7)), rng.normal(size=(total, 7))
    labels = rng.integers(0, 11, total)
    logits = hidden @ weight.T
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = logp[np.arange(total), labels]
    old, reference = own + rng.normal(size=total) * 0.4, own + rng.normal(size=total) * 0.5
    value, _ = advantages(torch.tensor(rng.normal(size=(2, 3))))
    return lengths, output, weight, hidden, labels, logp, old, reference, value.flatten().numpy()


def by_hand(name, lengths, output, weight, hidden, labels, logp, old, reference, advantage):
    """(loss, gradients of the log-probabilities, of the head's weight), in loops, from the definition."""
    n, own = len(lengths), logp[np.arange(len(labels)), labels]
    loss, dlogp = 0.0, np.zeros(len(labels))
    for i in range(n):
        tokens = [t for t in range(len(labels)) if output[t] == i]
        groups = [tokens] if name == "grpo_printed" else [[t] for t in tokens]
        for terms in groups:
            log_ratio = sum(own[t] - old[t] for t in terms)
            away = sum(reference[t] - own[t] for t in terms)
            ratio, a = math.exp(log_ratio), advantage[i]
            clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
            value = min(ratio * a, clipped * a) - BETA * (math.exp(away) - away - 1)
            slope = (ratio * a if ratio * a <= clipped * a else 0.0) - BETA * (1 - math.exp(away))
            share = {
                "grpo": 1 / (n * lengths[i]), "grpo_printed": 1 / n, "dapo": 1 / sum(lengths), "dr_grpo": 1 / (n * LIMIT)
            }[name]  # fmt: skip
            loss -= share * value
            for t in terms:
                dlogp[t] -= share * slope
    onehot = np.eye(weight.shape[0])[labels]
    dlogits = dlogp[:, None] * (onehot - np.exp(logp))
    return loss, dlogp, dlogits.T @ hidden


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_loss_and_gradient_are_those_of_the_hand_formula(name):
    data = case()
    lengths, output, weight, hidden, labels, _, old, reference, advantage = data
    expected, dlogp, dweight = by_hand(name, *data)
    kind = normalization(name)
    head = torch.tensor(weight, requires_grad=True)
    logprob = -linear_cross_entropy(torch.tensor(hidden), head, torch.tensor(labels), reduction="none")
    logprob.retain_grad()
    share = token_weights(torch.tensor(lengths), kind, LIMIT)
    rest = (torch.tensor(old), torch.tensor(reference), torch.tensor(output), torch.tensor(advantage), share)
    result = policy_loss(logprob, *rest, **OPTIONS, whole=kind.whole)
    result.loss.backward()
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(logprob.grad, dlogp, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(head.grad, dweight, rtol=1e-10, atol=1e-13)
    assert result.clipped > 0 and result.count == (6 if kind.whole else len(labels))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_any_split_into_passes_adds_up(name):
    lengths, output, _, _, labels, logp, old, reference, advantage = case(1)
    kind = normalization(name)
    share = token_weights(torch.tensor(lengths), kind, LIMIT)
    own = torch.tensor(logp[np.arange(len(labels)), labels])
    fixed = [torch.tensor(x) for x in (old, reference, output)]

    def gradient(parts):
        leaf = own.clone().requires_grad_()
        for part in parts:
            here = torch.isin(fixed[2], torch.tensor(part))
            rest = [x[here] for x in fixed]
            policy_loss(
                leaf[here], *rest, torch.tensor(advantage), share, **OPTIONS, whole=kind.whole
            ).loss.backward()
        return leaf.grad

    whole = gradient([range(6)])
    for parts in ([[0, 1, 2], [3, 4, 5]], [[4, 2], [0, 5], [1], [3]]):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_an_output_with_copies_counts_as_often_as_if_it_stood_there(name):
    lengths, output, _, _, labels, logp, old, reference, advantage = case(2)
    kind = normalization(name)
    own = logp[np.arange(len(labels)), labels]

    def result(indices, copies):
        """Outputs of `case` by number, as if drawn in this order."""
        places = [np.flatnonzero(output == i) for i in indices]
        order = np.concatenate(places)
        owner = torch.tensor([n for n, place in enumerate(places) for _ in place])
        times = [1] * len(indices) if copies is None else copies
        drawn = torch.tensor([lengths[i] for i, n in zip(indices, times, strict=True) for _ in range(n)])
        share = token_weights(drawn, kind, LIMIT)[np.cumsum([0, *times[:-1]])]
        leaf = torch.tensor(own[order], requires_grad=True)
        found = policy_loss(
            leaf,
            torch.tensor(old[order]),
            torch.tensor(reference[order]),
            owner,
            torch.tensor(advantage[indices]),
            share,
            copies=None if copies is None else torch.tensor(copies),
            **OPTIONS,
            whole=kind.whole,
        )
        found.loss.backward()
        slope = {}
        for n, i in enumerate(indices):
            slope[i] = slope.get(i, 0) + leaf.grad[owner == n]
        return found, slope

    merged, slope = result([0, 3, 4], [3, 1, 2])
    apart, each = result([0, 0, 0, 3, 4, 4], None)
    assert (
        merged.count
        == apart.count
        == 3 * (1 if kind.whole else 3) + (1 if kind.whole else 5) + 2 * (1 if kind.whole else 2)
    )
    for name_ in ("loss", "kl", "clipped"):
        torch.testing.assert_close(getattr(merged, name_).double(), getattr(apart, name_).double())
    for i in (0, 3, 4):
        torch.testing.assert_close(slope[i], each[i])


def test_on_policy_it_is_the_policy_gradient_and_the_reference_costs_nothing():
    own = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    output, gain, share = (
        torch.tensor([0, 0, 1]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0.25, 0.5]).double(),
    )
    result = policy_loss(own, own.detach(), own.detach(), output, gain, share, **OPTIONS)
    result.loss.backward()
    assert own.grad.tolist() == [-0.25, -0.25, 0.5] and float(result.kl) == 0 == int(result.clipped)
    with pytest.raises(UserError, match=r"grpo.beta: must be 0 .*got 0.05"):
        policy_loss(own, own, None, output, gain, share, **OPTIONS)


def test_the_rate_warms_up_and_decays():
    constant = GrpoConfig(learning_rate=1.0, steps=9)
    assert [constant.rate(step) for step in (0, 5, 8)] == [1.0, 1.0, 1.0]
    config = GrpoConfig(learning_rate=1.0, final_rate=0.2, warmup=3, steps=10)
    rates = [config.rate(step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.2)
    assert rates[6] == pytest.approx(0.6) and all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_limits_name_themselves():
    with pytest.raises(UserError, match=r"grpo.normalization: must be one of .*got 'nothing'"):
        normalization("nothing")
    for change, words in (
        ({"group": 1}, "grpo.group: must be at least 2; got 1"),
        ({"minibatches": 5}, "grpo.minibatches: must divide grpo.prompts = 16; got 5"),
        ({"temperature": 0.0}, "grpo.temperature: must be positive"),
        ({"beta": -1.0}, "grpo.beta: must be at least 0"),
        ({"judge": -1.0}, "grpo.judge: must be at least 0"),
        ({"final_rate": 1.0}, r"grpo.final_rate: must be between 0 and grpo.learning_rate = 1e-06; got 1.0"),
    ):
        with pytest.raises(UserError, match=words):
            GrpoConfig(**change)
