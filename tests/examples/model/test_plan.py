"""The decode plan: every shortcut is taken where it should be and gives what the modules give."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import deepseek_ops
from examples.configs import get_config
from examples.model import plan as plans
from examples.model.calls import DIRECT, PUBLIC, calls_for
from examples.model.transformer import Transformer


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(
        replace(get_config("tiny").model, **{"vocab_size": 97, "mtp_depth": 1, **changes})
    ).eval()


def steps(model, tokens, start):
    """Logits of token-by-token decoding from `start` on, [B, S - start + 1, V]."""
    cache = model.new_cache(*tokens.shape)
    logits = [model.prefill(tokens[:, :start], cache).logits]
    for i in range(start, tokens.shape[1]):
        logits.append(model.decode_step(tokens[:, i : i + 1], cache).logits)
    return torch.cat(logits, 1)


def error(have, want):
    return float((have - want).norm() / want.norm())


@pytest.mark.parametrize(("rows", "small"), [(1, True), (40, False)])
def test_a_small_bf16_product_is_taken_in_fp32_and_rounded_once(rows, small, monkeypatch):
    weight, x = torch.randn(96, 128).bfloat16(), torch.randn(rows, 128).bfloat16()
    monkeypatch.setattr(plans, "SMALL_PRODUCT", 96 * 128 * 8)
    product = plans.Product(weight.mT)
    seen = []
    monkeypatch.setattr(product, "multiply", lambda a, b: seen.append(a.dtype) or torch.mm(a, b))
    have = product(x)
    assert seen == [torch.float32 if small else torch.bfloat16] and have.dtype == torch.bfloat16
    torch.testing.assert_close(have, F.linear(x.double(), weight.double()).bfloat16(), rtol=2**-7, atol=2**-8)


def test_large_weights_have_no_fp32_copy():
    assert plans.Product(torch.zeros(1024, 1024, dtype=torch.bfloat16)).wide is None
    assert plans.Product(torch.zeros(4, 4)).wide is None  # fp32 already


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 5, 150])  # 150: in chunks
def test_small_experts_all_compute_every_token(shared, rows, monkeypatch):
    moe = build(precision="fp32", num_shared_experts=shared).layers[1].ffn
    mixture = plans.Mixture(moe)
    assert mixture.small and mixture.chunk < 150
    x = torch.randn(rows, 128)
    with torch.no_grad():
        want = moe(x)
        monkeypatch.setattr(moe, "combine", None)  # not called
        torch.testing.assert_close(mixture(x, prompt=False, ops=PUBLIC), want, rtol=2e-5, atol=2e-6)


def test_prompts_and_large_experts_are_sorted_by_expert():
    moe = build(precision="fp32").layers[1].ffn
    mixture = plans.Mixture(moe)
    x = torch.randn(7, 128)
    with torch.no_grad():
        assert torch.equal(mixture(x, prompt=True, ops=PUBLIC), moe(x))
    with torch.device("meta"):
        large = build(hidden_size=2048, expert_inner_size=1024, num_experts=64).layers[1].ffn
    assert not plans.Mixture(large).small


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_steps_are_as_near_the_truth_as_the_full_pass_in_low_precision(precision):
    """Not near each other: a rounding may flip an expert. Truth: the same weights in fp32; several models, for flips."""
    errors = []
    for seed in range(5):
        model, truth = build(seed, precision=precision), build(seed, precision="fp32")
        truth.load_state_dict(model.state_dict())
        tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            full, want = model.logits(tokens)[:, 9:], truth.logits(tokens)[:, 9:]
        errors.append((error(steps(model, tokens, 10), want), error(full, want)))
    by_steps, by_full_pass = torch.tensor(errors).mean(0)
    assert by_steps < 1.25 * by_full_pass


def test_the_plan_follows_the_parameters():
    model = build(precision="fp32")
    tokens = torch.randint(0, 97, (2, 12))

    def check():
        with torch.no_grad():
            want = model.logits(tokens)[:, 7:]
        assert error(steps(model, tokens, 8), want) < 2e-5

    check()
    first = model._plan
    check()
    assert model._plan is first
    for change in (
        lambda: model.layers[1].ffn.experts.down.mul_(2.0),
        lambda: model.load_state_dict(build(precision="fp32", init_std=0.1).state_dict()),
        lambda: setattr(model.layers[0].attn.kv_b, "weight", torch.nn.Parameter(torch.randn(256, 64))),
        lambda: model.double().float(),
    ):
        before = model._plan
        with torch.no_grad():
            change()
        check()
        assert model._plan is not before


def test_parameters_made_in_inference_mode_are_never_assumed_unchanged():
    with torch.inference_mode():
        model = build(precision="fp32")
        tokens = torch.randint(0, 97, (1, 8))
        before = steps(model, tokens, 4)
        model.head.weight.mul_(2.0)
        torch.testing.assert_close(steps(model, tokens, 4), 2 * before)


def test_steps_count_tokens_when_training():
    model = build().train()
    cache = model.new_cache(2, 16)
    model.prefill(torch.randint(0, 97, (2, 6)), cache)
    before = model.expert_counts()
    model.decode_step(torch.randint(0, 97, (2, 1)), cache)
    assert (model.expert_counts() - before).sum(1).tolist() == [
        8,
        8,
        0,
    ]  # two MoE layers, top 4; the draft did not run


def test_a_step_without_observers_calls_the_references_and_rounds_alike(monkeypatch):
    model = build(precision="bf16")
    tokens = torch.randint(0, 97, (2, 9))
    seen = []
    monkeypatch.setattr(plans, "calls_for", lambda *tensors: seen.append(calls_for(*tensors)) or seen[-1])
    direct = steps(model, tokens, 5)
    assert seen and all(calls is DIRECT for calls in seen)
    monkeypatch.setattr(plans, "calls_for", lambda *tensors: PUBLIC)
    assert torch.equal(steps(model, tokens, 5), direct)


def test_a_step_that_somebody_watches_calls_the_ops(monkeypatch):
    x = torch.ones(2)
    with torch.no_grad():
        assert calls_for(x) is DIRECT
        with deepseek_ops.backend("modelled"):
            assert calls_for(x) is PUBLIC
        monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "modelled")
        assert calls_for(x) is PUBLIC
        monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "reference")
        assert calls_for(x) is DIRECT
        assert calls_for(x.to("meta")) is PUBLIC
        with torch.profiler.profile():
            assert calls_for(x) is PUBLIC
        with FakeTensorMode():
            assert calls_for(x) is PUBLIC
    assert calls_for(x) is PUBLIC  # somebody may want a gradient


@pytest.mark.parametrize("q_lora_rank", [64, None])
def test_weights_are_multiplied_out_where_that_is_cheaper(q_lora_rank, monkeypatch):
    model = build(precision="fp32", q_lora_rank=q_lora_rank)
    tokens = torch.randint(0, 97, (2, 9))
    merged = plans.AbsorbedMLA(model.layers[0].attn)
    assert merged.w_uv is None and (merged.w_uk is None) == (q_lora_rank is not None)
    have = steps(model, tokens, 5)
    monkeypatch.setattr(plans, "SETUP", -(1 << 40))
    apart = plans.AbsorbedMLA(model.layers[0].attn)
    assert apart.w_uv is not None and apart.w_uk is not None
    model._plan = None
    torch.testing.assert_close(have, steps(model, tokens, 5), rtol=2e-5, atol=2e-5)


def test_weights_of_the_reports_size_stay_apart():
    with torch.device("meta"):
        attn = build(
            hidden_size=7168, num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, num_layers=1, num_dense_layers=1, mtp_depth=0,
        ).layers[0].attn  # fmt: skip
    plan = plans.AbsorbedMLA(attn)
    assert plan.w_uk is not None and plan.w_uv is not None
