"""Sampling: the right distribution, the right support, and nothing but (logits, seed, place) decides."""

import pytest
import torch

from examples.rollout.sampling import Sampling, choose, uniform

LOGITS = torch.log(torch.tensor([[0.3, 0.05, 0.5, 0.15]]))


def counts(sampling, trials=4000, logits=LOGITS):
    chosen = choose(logits.expand(trials, -1), [(sampling, place) for place in range(trials)])
    return torch.bincount(torch.tensor(chosen), minlength=logits.shape[1]) / trials


def test_frequencies_follow_the_temperature():
    for temperature in (0.5, 1.0, 2.0):
        wanted = torch.softmax(LOGITS[0] / temperature, -1)
        torch.testing.assert_close(counts(Sampling(1, temperature)), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.4}, [2]),  # the first token always stays
        ({"top_p": 0.5}, [2]),  # 0.5 reaches 0.5
        ({"top_p": 0.6}, [0, 2]),
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 2, "top_p": 0.62}, [2]),  # of the two that are left, 0.5 / 0.8 reaches 0.62
        ({"top_k": 9}, [0, 1, 2, 3]),
    ],
)
def test_support(options, kept):
    share = counts(Sampling(1, 1.0, **options), 1000)
    assert share.nonzero().flatten().tolist() == kept
    wanted = torch.zeros(4).index_fill_(0, torch.tensor(kept), 1) * LOGITS[0].exp()
    torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.06, rtol=0)


def test_rows_do_not_depend_on_each_other():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    wanted = [
        (Sampling(1, t, p, k, seed=s), s)
        for s, (t, p, k) in enumerate(((0, 1, 0), (1, 0.9, 0), (2, 1, 5)) * 2)
    ]
    together = choose(logits, wanted)
    assert together == [choose(logits[i : i + 1], [wanted[i]])[0] for i in range(6)]
    assert together[0] == int(logits[0].argmax()) and together[3] == int(logits[3].argmax())


def test_uniform_numbers():
    values = torch.tensor([uniform(seed, place) for seed in (-5, 0, 2**62) for place in range(2000)])
    assert values.min() >= 0 and values.max() < 1 and len(values.unique()) > 5990
    torch.testing.assert_close(values.mean(), torch.tensor(0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(values.var(), torch.tensor(1 / 12), atol=0.01, rtol=0)


def test_no_token_without_mass_is_ever_chosen():
    """-inf logits, and a random number at the very top."""
    logits = torch.tensor([[0.0, -torch.inf, 0.3, -torch.inf, -torch.inf]])
    assert counts(Sampling(1, 1.0), 2000, logits)[[1, 3, 4]].sum() == 0
