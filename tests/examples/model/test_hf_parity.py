"""The model is transformers' DeepseekV3: per-layer states, logits, loss and every gradient, in fp32 to 1e-5."""

import pytest
import torch
import torch.nn.functional as F

from examples.model.hf import load_hf_state_dict, to_hf_state_dict
from examples.model.transformer import Transformer

TOLERANCE = 1e-5


@pytest.mark.parametrize("variant", ["plain", "yarn", "no_q_lora", "one_group"])
@pytest.mark.parametrize("recompute", [False, True])
def test_states_logits_loss_and_gradients(ref, variant, recompute):
    config = ref.config(recompute=recompute, **ref.variants[variant])
    model = ref.model(config)
    theirs = ref.hf(model)
    tokens = ref.tokens(3, 38)
    states = []
    for block in model.layers:
        block.register_forward_hook(lambda _m, _i, out: states.append(out[0] + out[1]))

    want = theirs(tokens[:, :-1], output_hidden_states=True, use_cache=False)
    want_loss = F.cross_entropy(want.logits.flatten(0, 1), tokens[:, 1:].flatten())
    want_loss.backward()
    got = model.loss(tokens, mtp_weight=0.0, balance_alpha=0.0)
    got.loss.backward()

    for ours, layer in zip(states[:-1], want.hidden_states[1:-1], strict=True):
        assert ref.relative(ours.view_as(layer), layer) < TOLERANCE
    assert ref.relative(model(tokens[:, :-1]), want.hidden_states[-1]) < TOLERANCE
    assert ref.relative(model.logits(tokens[:, :-1]), want.logits) < TOLERANCE
    assert ref.relative(got.loss, want_loss) < TOLERANCE
    pairs = ref.gradients(model, theirs)
    assert len(pairs) == len(list(theirs.parameters()))
    for name, (ours, layer) in pairs.items():
        assert ref.relative(ours, layer) < TOLERANCE, name


def test_bf16_agrees_by_direction(ref):
    fp32 = ref.model(ref.config(), seed=3)
    model = Transformer(ref.config(precision="bf16"))
    load_hf_state_dict(model, to_hf_state_dict(fp32))
    assert model.embed.weight.dtype == torch.bfloat16
    theirs = ref.hf(fp32).bfloat16()
    for router, layer in zip(model.routers(), theirs.model.layers[1:], strict=False):
        layer.mlp.gate.e_score_correction_bias = router.bias.clone()  # their cast rounds it, ours must not
        assert router.bias.dtype == torch.float32
    tokens = ref.tokens(2, 33)
    ours, exact = model.logits(tokens), fp32.logits(tokens)
    want = theirs(tokens, use_cache=False).logits.float()

    def closeness(a, b):
        return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))

    # Routing flips where two affinities are a bf16 rounding apart, in their model as in ours: compare the distances.
    assert closeness(ours, want) > 0.99
    assert 1 - closeness(ours, exact) < 2 * (1 - closeness(want, exact)) + 1e-4


def test_yarn_changes_the_answer(ref):
    """Guards the parity test above: with YaRN switched off the same weights give something else."""
    yarn = ref.config(**ref.variants["yarn"])
    model = ref.model(yarn)
    plain = Transformer(ref.config(max_positions=256))
    load_hf_state_dict(plain, to_hf_state_dict(model))
    tokens = ref.tokens(1, 40)
    assert ref.relative(plain.logits(tokens), model.logits(tokens)) > 1e-2
    assert yarn.softmax_scale == pytest.approx(24**-0.5 * (0.1 * 2.0794415 + 1) ** 2)


def test_mtp_logits_are_those_of_transformers_mtp_model(ref):
    """Concatenation order, the state that is fed, positions and the output norm, for two depths in a chain."""
    model = ref.model(ref.config(mtp_depth=2))
    theirs = ref.hf(model)
    mtp, cache = ref.hf_mtp(model, theirs)
    tokens = ref.tokens(1, 20)
    hidden = theirs(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
    ours = model.mtp_logits(tokens)
    for k in (1, 2):
        fed = tokens[:, k:]
        positions = torch.arange(k, 20)[
            None
        ]  # they count the fed token, we the state; RoPE sees differences only
        hidden = mtp.forward_layer(k - 1, hidden[:, : fed.shape[1]], positions, cache, input_ids=fed)
        assert ref.relative(ours[k - 1], theirs.lm_head(hidden)) < TOLERANCE


def test_packed_rows_match_transformers_position_reset(ref):
    """transformers masks documents by reset positions, but only without its cache."""
    model = ref.model(ref.config())
    theirs = ref.hf(model)
    tokens = ref.tokens(1, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    want = theirs(tokens, position_ids=positions, use_cache=False).logits
    borders = torch.tensor([0, 11, 30], dtype=torch.int32)
    assert ref.relative(model.logits(tokens, positions, borders), want) < TOLERANCE
