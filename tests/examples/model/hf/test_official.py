"""Names and rank files of DeepSeek's inference code, there and back."""

import json

import pytest
import torch

from examples.errors import UserError
from examples.model.hf.official import from_official, official_name, to_official


def rank_file(folder, rank, ranks):
    from safetensors.torch import load_file

    return load_file(folder / f"model{rank}-mp{ranks}.safetensors")


def test_names():
    """Facts of inference/convert.py and model.py of deepseek-ai/DeepSeek-V3."""
    want = {
        "model.embed_tokens.weight": "embed.weight",
        "model.layers.3.input_layernorm.weight": "layers.3.attn_norm.weight",
        "model.layers.3.self_attn.q_a_proj.weight_scale_inv": "layers.3.attn.wq_a.scale",
        "model.layers.3.self_attn.q_a_layernorm.weight": "layers.3.attn.q_norm.weight",
        "model.layers.3.self_attn.q_b_proj.weight": "layers.3.attn.wq_b.weight",
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": "layers.3.attn.wkv_a.weight",
        "model.layers.3.self_attn.kv_a_layernorm.weight": "layers.3.attn.kv_norm.weight",
        "model.layers.3.self_attn.kv_b_proj.weight_scale_inv": "layers.3.attn.wkv_b.scale",
        "model.layers.3.self_attn.o_proj.weight": "layers.3.attn.wo.weight",
        "model.layers.3.post_attention_layernorm.weight": "layers.3.ffn_norm.weight",
        "model.layers.0.mlp.gate_proj.weight": "layers.0.ffn.w1.weight",
        "model.layers.0.mlp.down_proj.weight": "layers.0.ffn.w2.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight": "layers.3.ffn.shared_experts.w3.weight",
        "model.layers.3.mlp.experts.255.up_proj.weight_scale_inv": "layers.3.ffn.experts.255.w3.scale",
        "model.layers.3.mlp.gate.weight": "layers.3.ffn.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias": "layers.3.ffn.gate.bias",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
        "model.layers.61.eh_proj.weight": "layers.61.eh_proj.weight",
        "model.layers.61.shared_head.norm.weight": "layers.61.shared_head.norm.weight",
    }
    assert {name: official_name(name) for name in want} == want


def test_every_rank_gets_its_part(kit, bits, ref, tmp_path):
    """mp 2: rows of q_b, w1, w3, embedding and head; columns of wo and w2; experts in halves; the rest whole."""
    model = ref.model(ref.config(vocab_size=98, precision="bf16"))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf")
    hf = kit.read(folder)
    out = to_official(folder, tmp_path / "out", ranks=2, quiet=True)
    ranks = [rank_file(out, r, 2) for r in range(2)]
    layer = "layers.1"
    for rank, found in enumerate(ranks):
        rows = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
        rows |= {f"{layer}.attn.wq_b.weight": f"model.{layer}.self_attn.q_b_proj.weight"}
        rows |= {
            f"{layer}.ffn.shared_experts.w1.weight": f"model.{layer}.mlp.shared_experts.gate_proj.weight"
        }
        for new, old in rows.items():
            assert bits(found[new], hf[old].chunk(2, dim=0)[rank]), new
        columns = {f"{layer}.attn.wo.weight": f"model.{layer}.self_attn.o_proj.weight"}
        columns |= {"layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight"}
        for new, old in columns.items():
            assert bits(found[new], hf[old].chunk(2, dim=1)[rank]), new
        assert bits(
            found[f"{layer}.attn.wkv_a.weight"], hf[f"model.{layer}.self_attn.kv_a_proj_with_mqa.weight"]
        )
        held = {int(n.split(".")[4]) for n in found if ".ffn.experts." in n}
        assert held == set(range(8 * rank, 8 * rank + 8))
        name = f"model.{layer}.mlp.experts.{8 * rank + 1}.down_proj.weight"
        assert bits(found[f"{layer}.ffn.experts.{8 * rank + 1}.w2.weight"], hf[name])
        assert not any(n.startswith("layers.3.") for n in found)  # MTP, as in the official tool
    back = kit.read(from_official(out, tmp_path / "back", shard_bytes=60_000, quiet=True))
    main = {n: t for n, t in hf.items() if not n.startswith("model.layers.3.")}
    assert back.keys() == main.keys() and all(bits(back[n], main[n]) for n in main)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_fp8_with_mtp_there_and_back_is_the_same_bytes(exported, tmp_path):
    out = to_official(exported["fp8"], tmp_path / "out", ranks=1, mtp=True, quiet=True)
    found = rank_file(out, 0, 1)
    assert "layers.3.shared_head.head.weight" in found and "layers.1.attn.wkv_a.scale" in found
    back = from_official(out, tmp_path / "back", shard_bytes=60_000, quiet=True)
    assert len(list(back.glob("model*"))) == len(list(exported["fp8"].glob("model*")))
    for file in exported["fp8"].glob("model*"):
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def test_fp8_scales_follow_their_weights(kit, bits, ref, tmp_path):
    """Rows and columns cut between blocks: rank 1 has the second half of the scales, along the same axis."""
    sides = {
        "hidden_size": 128,
        "num_heads": 4,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    }
    sides |= {"dense_inner_size": 256, "expert_inner_size": 128, "num_shared_experts": 2, "vocab_size": 98}
    model = ref.model(
        ref.config(precision="bf16", num_experts=4, num_groups=2, top_groups=1, top_k=2, **sides)
    )
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    hf = kit.read(folder)
    out = to_official(folder, tmp_path / "out", ranks=2, mtp=True, quiet=True)
    second = rank_file(out, 1, 2)
    assert bits(
        second["layers.1.attn.wq_b.scale"], hf["model.layers.1.self_attn.q_b_proj.weight_scale_inv"][2:]
    )
    assert bits(
        second["layers.1.attn.wo.scale"], hf["model.layers.1.self_attn.o_proj.weight_scale_inv"][:, 1:]
    )
    back = kit.read(from_official(out, tmp_path / "back", quiet=True))
    assert back.keys() == hf.keys() and all(bits(back[n], hf[n]) for n in hf)


def test_what_cannot_be_split(exported, tmp_path):
    cases = [("bf16", 0, "--mp: must divide the 4 experts; got 0"), ("bf16", 3, "the 4 experts; got 3")]
    cases += [("bf16", 4, r"--mp: must divide axis 0 of model.embed_tokens.weight, shape \[97, 144\]; got 4")]
    for form, ranks, message in cases:
        with pytest.raises(UserError, match=message):
            to_official(exported[form], tmp_path / "out", ranks=ranks, quiet=True)
    assert not list(tmp_path.iterdir())


def test_fp8_block_that_would_be_cut(kit, ref, tmp_path):
    model = ref.model(ref.config(vocab_size=98, precision="bf16"))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    with pytest.raises(
        UserError, match=r"must cut model.layers.0.self_attn.q_b_proj.weight, .* between blocks of 128"
    ):
        to_official(folder, tmp_path / "out", ranks=2, quiet=True)


def test_rank_files_that_do_not_fit(kit, ref, tmp_path):
    from safetensors.torch import save_file

    model = ref.model(ref.config(vocab_size=98, precision="bf16"))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf")

    def spoiled(name, edit):
        out = to_official(folder, tmp_path / name, ranks=2, quiet=True)
        tensors = rank_file(out, 1, 2)
        edit(tensors)
        save_file(tensors, out / "model1-mp2.safetensors")
        return out

    def refused(out, message):
        with pytest.raises(UserError, match=message):
            from_official(out, tmp_path / "back", quiet=True)

    gate = "layers.1.ffn.gate.weight"
    refused(spoiled("a", lambda t: t.pop(gate)), f"model1-mp2.safetensors: {gate} is missing")
    refused(
        spoiled("b", lambda t: t[gate].add_(1)),
        f"model1-mp2.safetensors: {gate} must equal the copy in model0",
    )
    refused(spoiled("c", lambda t: t.update(x=torch.ones(1))), "model1-mp2.safetensors: x has no place")
    refused(spoiled("d", lambda t: t.update({gate: t[gate].float()})), f"{gate} must have one shape and type")
    refused(
        spoiled("e", lambda t: t.pop("layers.1.ffn.experts.9.w1.weight")), "experts.9.w1.weight .*is missing"
    )
    (tmp_path / "a" / "model1-mp2.safetensors").unlink()
    refused(tmp_path / "a", "model1-mp2.safetensors: is missing")
    (tmp_path / "b" / "config.json").unlink()
    refused(tmp_path / "b", "has no config.json; name the released one with --config")
    refused(tmp_path / "hf", "must hold the rank files of one split")
