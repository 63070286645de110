"""The FP8 model: which parts compute in FP8 (report section 3.3.1), and that it follows the bf16 model."""

import pytest
import torch

from deepseek_ops.nn import Fp8Experts, Fp8Linear
from examples.model.hf import load_hf_state_dict, to_hf_state_dict
from examples.model.transformer import Transformer


def test_every_linear_is_fp8_but_those_the_report_spares(ref):
    model = Transformer(ref.config(precision="fp8"))
    fp8 = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear | Fp8Experts)}
    block = {"attn.qkv_a", "attn.q_b", "attn.kv_b", "attn.o"}
    moe = {"ffn.experts", "ffn.shared.gate_up", "ffn.shared.down"}
    want = {f"layers.0.{name}" for name in block | {"ffn.gate_up", "ffn.down"}}
    for prefix in ("layers.1", "layers.2", "mtp.0.block"):
        want |= {f"{prefix}.{name}" for name in block | moe}
    assert fp8 == want | {"mtp.0.proj"}
    caches = {name: model.get_submodule(name).cache for name in fp8 if not name.endswith("experts")}
    assert {name for name, cache in caches.items() if cache == "e5m6"} == {
        n for n in fp8 if n.endswith("attn.o")
    }
    masters = {p.dtype for name in fp8 for p in model.get_submodule(name).parameters()}
    assert masters == {torch.float32}
    for kept_high in (model.embed, model.head, model.norm, model.layers[1].ffn.router):
        assert kept_high.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("recompute", [False, True])
def test_fp8_follows_bf16_in_loss_and_gradient(ref, recompute):
    exact = ref.model(ref.config(), seed=4)
    tokens = ref.tokens(4, 33)
    options = {"mtp_weight": 0.3, "balance_alpha": 1e-4}
    want = exact.loss(tokens, **options)
    want.loss.backward()
    model = Transformer(ref.config(precision="fp8", recompute=recompute))
    load_hf_state_dict(model, to_hf_state_dict(exact))
    out = model.loss(tokens, **options)
    out.loss.backward()
    assert float((out.main - want.main).detach().abs() / want.main.detach()) < 0.02
    assert float((out.mtp[0] - want.mtp[0]).abs() / want.mtp[0]) < 0.02
    theirs = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        a, b = parameter.grad.double().flatten(), theirs[name].grad.double().flatten()
        # Routing flips where affinities are a rounding apart, so experts see other tokens: direction, not value.
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.75, name


def test_fp8_weights_round_trip_through_hf_names(ref):
    model = ref.model(ref.config(precision="fp8"))
    other = ref.model(ref.config(precision="fp8"), seed=8)
    load_hf_state_dict(other, to_hf_state_dict(model))
    tokens = ref.tokens(2, 20)
    with torch.no_grad():  # the cached FP8 copies notice that their masters changed
        assert torch.equal(model.logits(tokens), other.logits(tokens))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_cached_decoding_follows_the_full_pass(ref, precision):
    model = ref.model(ref.config(precision=precision, num_layers=1, mtp_depth=0)).eval()  # dense: no flips
    tokens = ref.tokens(2, 20)
    cache = model.new_cache(2, 32)
    got = [model.prefill(tokens[:, :12], cache).logits]
    got += [model.decode_step(tokens[:, i : i + 1], cache).logits for i in range(12, 20)]
    with torch.no_grad():
        want = model.logits(tokens)[:, 11:]
    bound = 0.02 if precision == "bf16" else 0.08  # decoding multiplies by W_UK and W_UV unquantised
    assert ref.relative(torch.cat(got, 1), want) < bound
