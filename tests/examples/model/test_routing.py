"""The routing bias and its counters: fp32 and int64 whatever the model is cast to, every token counted once."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from examples.model.layers import Experts
from examples.model.moe import MoE


def test_bias_and_counts_survive_casts_exactly(ref):
    model = ref.model(ref.config())
    model.loss(ref.tokens(1, 9))
    bias = [router.bias.clone() for router in model.routers()]
    counts = model.expert_counts()
    for cast in (model.bfloat16, model.half, model.float):
        cast()
        for router, before in zip(model.routers(), bias, strict=True):
            assert router.bias.dtype == torch.float32 and torch.equal(router.bias, before)
            assert router.counts.dtype == torch.int64
    assert torch.equal(model.expert_counts(), counts)


def test_bias_and_counts_are_state_and_not_parameters(ref):
    model = ref.model(ref.config())
    state = model.state_dict()
    assert {
        "layers.1.ffn.router.bias",
        "layers.1.ffn.router.counts",
        "mtp.0.block.ffn.router.bias",
    } <= state.keys()
    assert not [name for name, _ in model.named_parameters() if name.endswith((".bias", ".counts"))]


@pytest.mark.parametrize("how", ["plain", "recompute", "checkpoint", "reentrant"])
def test_each_token_is_counted_once(ref, how):
    model = ref.model(ref.config(recompute=how == "recompute"))
    tokens = ref.tokens(2, 17)
    if how in ("checkpoint", "reentrant"):  # somebody checkpoints whole blocks
        for block in model.layers:
            inner = block.forward
            block.forward = lambda *a, _f=inner: checkpoint(_f, *a, use_reentrant=how == "reentrant")
    for _ in range(2):
        model.loss(tokens, mtp_weight=0.0).loss.backward()
    assert model.expert_counts().sum(1).tolist() == [2 * 2 * 16 * 4, 2 * 2 * 16 * 4, 0]
    model.eval()
    model.loss(tokens)
    assert int(model.expert_counts().sum()) == 2 * 2 * 2 * 16 * 4


def test_update_is_the_sign_rule_and_starts_again(ref):
    model = ref.model(ref.config())
    for _ in range(3):
        model.loss(ref.tokens(2, 17))
    counts = model.expert_counts()
    before = [router.bias.clone() for router in model.routers()]
    storage = [router.bias.data_ptr() for router in model.routers()]
    model.update_bias(0.01)
    for count, old, router, pointer in zip(counts, before, model.routers(), storage, strict=True):
        assert router.bias.data_ptr() == pointer  # in place: whoever holds the buffer sees the change
        for expert in range(16):
            step = float(router.bias[expert] - old[expert])
            mean = float(count.sum()) / 16
            want = 0.01 if count[expert] < mean else -0.01 if count[expert] > mean else 0.0
            assert step == pytest.approx(want, abs=1e-6)
    assert int(model.expert_counts().sum()) == 0


def test_repeated_updates_balance_a_skewed_router(ref):
    """The mechanism works: a router that prefers few experts spreads its tokens without any gradient."""
    torch.manual_seed(0)
    moe = MoE(ref.config(num_groups=1, top_groups=1))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.1)
        moe.router.weight[:4] += 0.2
    x = torch.randn(512, 64) + 0.3
    loads = []
    for _ in range(200):
        moe(x)
        counts = moe.router.counts.double()
        loads.append(float(counts.max() / counts.mean() - 1))
        moe.router.update_bias(0.01)
    assert loads[0] > 1.5 and loads[-1] < 0.5


def test_bias_chooses_but_does_not_weigh(ref):
    """Eq. 16: lifting all biases alike changes nothing; lifting one expert's brings it in with its own affinity."""
    model = ref.model(ref.config())
    router = model.layers[1].ffn.router
    x = torch.randn(20, 64)
    weight, routing = router(x)
    router.bias += 0.5
    lifted_weight, lifted = router(x)
    assert torch.equal(routing.topk_idx.sort(1)[0], lifted.topk_idx.sort(1)[0])
    assert torch.allclose(weight.sort(1)[0], lifted_weight.sort(1)[0])
    router.bias[7] += 100
    weight, routing = router(x)
    assert (routing.topk_idx == 7).any(1).all()
    assert torch.allclose(weight.sum(1), torch.full((20,), 2.5))
    gate = routing.scores.gather(1, routing.topk_idx)
    assert torch.allclose(weight, 2.5 * gate / gate.sum(1, keepdim=True), rtol=1e-5)


def test_a_token_visits_at_most_the_allowed_groups(ref):
    model = ref.model(ref.config(top_groups=2))
    record = []
    model(ref.tokens(4, 30), record=record)
    for routing in record:
        groups = routing.topk_idx // 4
        assert all(len(set(row.tolist())) <= 2 for row in groups)
        assert all(len(set(row.tolist())) == 4 for row in routing.topk_idx)


def test_moe_is_the_plain_sum_over_experts(ref):
    torch.manual_seed(1)
    moe = MoE(ref.config())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(11, 64)
    weight, routing = moe.router(x)
    want = moe.shared(x)
    experts = moe.experts
    assert isinstance(experts, Experts)
    for token in range(11):
        for slot in range(4):
            e = int(routing.topk_idx[token, slot])
            gate, up = (experts.gate_up[e] @ x[token]).chunk(2)
            inner = gate * torch.sigmoid(gate) * up
            want[token] = want[token] + weight[token, slot] * (experts.down[e] @ inner)
    assert ref.relative(moe(x), want) < 1e-5
