"""Weights under the released names: a bijection, strict about everything that does not fit."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from examples.configs import get_config
from examples.errors import UserError
from examples.model.hf import hf_config, load_hf_state_dict, to_hf_state_dict
from examples.model.transformer import Transformer


@pytest.mark.parametrize("changes", [{"mtp_depth": 2}, {"q_lora_rank": None, "num_shared_experts": 1}])
def test_round_trip(ref, changes):
    config = ref.config(**changes)
    model = ref.model(config, seed=1)
    state = {name: tensor.clone() for name, tensor in to_hf_state_dict(model).items()}
    other = ref.model(config, seed=2)
    load_hf_state_dict(other, state)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(model.routers(), other.routers(), strict=True):
        assert torch.equal(a.bias, b.bias)
    total = sum(p.numel() for p in model.parameters()) + sum(r.bias.numel() for r in model.routers())
    assert sum(tensor.numel() for tensor in state.values()) == total  # every value once


def test_export_is_views(ref):
    model = ref.model(ref.config())
    state = to_hf_state_dict(model)
    with torch.no_grad():
        model.layers[1].ffn.experts.gate_up.fill_(7.0)
    assert state["model.layers.1.mlp.experts.3.up_proj.weight"].unique().tolist() == [7.0]


def test_names_and_shapes_of_the_released_checkpoint():
    """Spot checks of DeepSeek-V3's own index, MTP layer included, on the meta device."""
    with torch.device("meta"):
        model = Transformer(get_config("v3_671b").model)
    state = to_hf_state_dict(model, shared_copies=True)
    want = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.0.self_attn.q_a_layernorm.weight": (1536,),
        "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.2.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.3.mlp.experts.255.down_proj.weight": (7168, 2048),
        "model.layers.61.mlp.shared_experts.up_proj.weight": (2048, 7168),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.enorm.weight": (7168,),
        "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "lm_head.weight": (129280, 7168),
    }
    for name, shape in want.items():
        assert tuple(state[name].shape) == shape, name


def test_transformers_loads_the_export_from_disk(ref, tmp_path):
    """config.json and one tensor per expert, as transformers reads a released folder; equal logits."""
    import json

    from safetensors.torch import save_file

    model = ref.model(ref.config(mtp_depth=0, **ref.variants["yarn"]))
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model.config)))
    state = {name: tensor.clone() for name, tensor in to_hf_state_dict(model).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(theirs.config, DeepseekV3Config)
    tokens = ref.tokens(2, 20)
    assert ref.relative(model.logits(tokens), theirs(tokens, use_cache=False).logits) < 1e-5


def test_shared_copies_must_agree(ref):
    model = ref.model(ref.config())
    state = dict(to_hf_state_dict(model, shared_copies=True))
    load_hf_state_dict(model, state)
    name = "model.layers.3.shared_head.head.weight"
    state[name] = state[name] + 1
    with pytest.raises(UserError, match=f"{name} must equal lm_head.weight"):
        load_hf_state_dict(model, state)


def test_what_does_not_fit_is_named_and_nothing_is_written(ref):
    model = ref.model(ref.config())
    good = {name: tensor.clone() + 1 for name, tensor in to_hf_state_dict(model).items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gate = "model.layers.2.mlp.gate.weight"
    cases = [
        ({k: v for k, v in good.items() if k != gate}, f"{gate} is missing"),
        ({**good, gate: good[gate][:, 1:]}, rf"{gate} must have shape \(16, 64\); got \(16, 63\)"),
        (
            {**good, "model.layers.2.mlp.gate.wieght": good[gate]},
            f"wieght has no place.*nearest name is {gate}",
        ),
        (
            {**good, "model.layers.9.input_layernorm.weight": good[gate]},
            "layers.9.input_layernorm.weight has no",
        ),
        ({}, r"is missing \(and \d+ more\)"),
    ]
    for state, message in cases:
        with pytest.raises(UserError, match=message):
            load_hf_state_dict(model, state)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])
