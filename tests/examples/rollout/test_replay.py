"""Group sampling and router replay: the trainer sees the rollout's experts and gets the rollout's log-probabilities."""

from dataclasses import replace

import pytest
import torch

from deepseek_ops._checks import ArgumentError
from examples.model.config import ModelConfig
from examples.model.transformer import Transformer
from examples.rollout.generate import generate
from examples.rollout.group import draw, sample_groups
from examples.rollout.replay import FREE, main_routers, recording, replaying
from examples.train.outputs import merge_equal, pack_outputs, token_logprobs

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, num_layers=3, num_dense_layers=1, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, dense_inner_size=48, expert_inner_size=16, num_experts=8,
    top_k=2, num_groups=4, top_groups=2, mtp_depth=1, max_positions=48, init_std=0.15, precision="fp32",
)  # fmt: skip
EOS = 3
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def outputs(model):
    return sample_groups(model, PROMPTS, 4, 12, eos=EOS, seed=7)


def perturb(model, size):
    for seed, router in enumerate(main_routers(model)):
        noise = torch.randn(router.bias.shape, generator=torch.Generator().manual_seed(seed))
        router.bias.copy_(size * noise)


def test_groups_have_their_prompts_and_ends(outputs, model):
    assert [o.prompt for o in outputs] == [p for p in PROMPTS for _ in range(4)]
    assert len({tuple(o.tokens) for o in outputs}) > 6
    for o in outputs:
        assert 1 <= len(o.tokens) <= 12 and EOS not in o.tokens[:-1]
        assert o.ended == (o.tokens[-1] == EOS) and (o.ended or len(o.tokens) == 12)
        assert o.routes.shape == (2, len(o.prompt) + len(o.tokens) - 1, 2) and int(o.routes.min()) >= 0
    assert any(o.ended for o in outputs) and not all(o.ended for o in outputs)
    again = sample_groups(model, PROMPTS, 4, 12, eos=EOS, seed=7)
    assert [o.tokens for o in again] == [o.tokens for o in outputs]
    other = sample_groups(model, PROMPTS, 4, 12, eos=EOS, seed=8)
    assert [o.tokens for o in other] != [o.tokens for o in outputs]


def test_draws_follow_the_distribution_and_never_take_what_is_impossible(monkeypatch):
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(probability.expand(20000, 6), generator).flatten(), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    # five standard deviations of 20000 draws
    torch.testing.assert_close(counts / 20000, probability[0], rtol=0, atol=0.018)
    for number, index in ((0.0, 1), (0.499, 1), (0.501, 3), (0.71, 4), (1 - 2**-24, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, number=number, **_: torch.full(shape, number))
            assert draw(probability, generator).item() == index


def test_a_cold_sample_is_greedy(model):
    cold = sample_groups(model, PROMPTS, 2, 8, eos=EOS, temperature=1e-4)
    greedy = generate(model, PROMPTS, 8, eos=EOS).tokens
    assert [o.tokens for o in cold] == [t for t in greedy for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_training_pass_gives_the_rollouts_log_probabilities(model, temperature):
    drawn = sample_groups(model, PROMPTS, 4, 12, eos=EOS, temperature=temperature, seed=1)
    packs = pack_outputs(drawn, range(len(drawn)), 40, pad=0, micro_batch=2)
    assert len(packs) > 1
    found = {}
    for pack in packs:
        mine = token_logprobs(model, pack, temperature, replay=True)
        torch.testing.assert_close(mine, pack.sampled, rtol=1e-6, atol=2e-6)
        for i in pack.output.unique().tolist():
            found[i] = mine[pack.output == i]
    assert sorted(found) == list(range(len(drawn)))
    for i, output in enumerate(drawn):
        torch.testing.assert_close(found[i], output.logprobs, rtol=1e-6, atol=2e-6)


def test_the_entropy_is_that_of_the_distributions_drawn_from(model, outputs):
    for output in outputs[::3]:
        whole = torch.tensor([output.prompt + output.tokens[:-1]])
        with torch.no_grad():
            logits = model.head(model(whole))[0, len(output.prompt) - 1 :]
        expected = torch.distributions.Categorical(logits=logits.double()).entropy().sum()
        assert output.entropy == pytest.approx(float(expected), rel=1e-4)


def test_equal_outputs_are_merged_with_their_number(outputs):
    drawn = [outputs[0], outputs[1], outputs[0], outputs[4], outputs[0]]
    assert outputs[0].tokens != outputs[1].tokens
    assert merge_equal(drawn, range(5), [1.0, 1.0, 1.0, 1.0, 1.0]) == ([0, 1, 3], [3, 1, 1])
    assert merge_equal(drawn, range(1, 5), [1.0, 1.0, 1.0, 1.0, 2.0]) == ([1, 2, 3, 4], [1, 1, 1, 1])
    other = replace(outputs[0], prompt=[9, 9])  # the same answer to another question
    assert merge_equal([outputs[0], other], range(2), [1.0, 1.0]) == ([0, 1], [1, 1])


def test_a_repeated_cache_continues_each_sequence_on_its_own(model):
    """Two copies of two prompts, fed different tokens: each gets what its whole sequence gets without a cache."""
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    cache = model.new_cache(2, 8, drafts=False)
    model.prefill(tokens, cache, torch.tensor([4, 2]))
    cache = cache.repeat(2)
    model.decode_step(torch.tensor([[20], [21], [22], [23]]), cache)
    logits = model.decode_step(torch.tensor([[30], [31], [32], [33]]), cache).logits[:, -1]
    for row, start in enumerate(([5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [9, 10])):
        whole = model.head(model(torch.tensor([[*start, 20 + row, 30 + row]]))[:, -1])
        torch.testing.assert_close(logits[row], whole[0].float(), rtol=1e-4, atol=1e-5)


def test_replay_keeps_the_experts_when_the_router_has_moved(model, outputs):
    """The bias decides choices only, so with the choices replayed a moved bias changes nothing, and without them a lot."""
    (pack,) = pack_outputs(outputs, range(len(outputs)), 40, pad=0)
    perturb(model, 0.5)
    try:
        with_replay = token_logprobs(model, pack, 1.0, replay=True)
        without = token_logprobs(model, pack, 1.0, replay=False)
    finally:
        perturb(model, 0.0)
    torch.testing.assert_close(with_replay, pack.sampled, rtol=1e-6, atol=2e-6)
    assert float((without - pack.sampled).abs().max()) > 1e-3
    assert all(router.intercept is None for router in model.routers())


def test_replaying_ones_own_choices_changes_no_bit_and_keeps_the_gradient(model):
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    with recording(model) as taken:
        plain = model(tokens)
    routes = torch.stack([passes[0] for passes in taken])
    gradients = []
    for choice in (None, routes, torch.full_like(routes, FREE)):
        model.zero_grad()
        with replaying(model, choice):
            hidden = model(tokens)
        assert torch.equal(hidden, plain)
        hidden.square().sum().backward()
        gradients.append([router.weight.grad.clone() for router in main_routers(model)])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_routes_of_another_shape_are_refused(model):
    with (
        pytest.raises(ArgumentError, match="routes: must be of 2 layers; got 3"),
        replaying(model, torch.zeros(3, 4, 2)),
    ):
        pass
    with (
        replaying(model, torch.zeros(2, 5, 2)),
        pytest.raises(ArgumentError, match=r"routes: must be \[4, 2\]"),
    ):
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert all(router.intercept is None for router in model.routers())
