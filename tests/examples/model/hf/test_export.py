"""What we write: bit for bit our weights, byte for byte our quantiser, and a model that transformers computes alike."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, DeepseekV3ForCausalLM

from deepseek_ops.quantize import dequantize_128x128, quantize_128x128
from examples.errors import UserError
from examples.model.hf import load_hf_state_dict, to_hf_state_dict
from examples.model.hf.load import load_model
from examples.model.transformer import Transformer

FP8_PARTS = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FP8_PARTS += ("gate_proj", "up_proj", "down_proj")


def test_bf16_is_bit_exact_in_many_shards(kit, bits, model, exported):
    folder = exported["bf16"]
    found = kit.read(folder)
    want = to_hf_state_dict(model, shared_copies=True)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert bits(found[name], tensor), name
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for file in files:
        held = {n for n in kit.header(folder / file) if n != "__metadata__"}
        assert held == {n for n, f in index["weight_map"].items() if f == file}
        size = sum(found[n].nbytes for n in held)
        assert size <= 60_000 or len(held) == 1


@pytest.mark.parametrize("pow2", [False, True])
def test_fp8_is_the_quantiser_byte_for_byte(kit, bits, model, saved, tmp_path, pow2):
    folder = kit.export(saved, tmp_path / "fp8", form="fp8", pow2_scales=pow2)
    found = kit.read(folder)
    quantised = 0
    for name, tensor in to_hf_state_dict(model, shared_copies=True).items():
        if name.split(".")[-2] in FP8_PARTS:
            q, scale = quantize_128x128(tensor, pow2=pow2)
            assert bits(found.pop(name), q), name
            assert bits(found.pop(name + "_scale_inv"), scale), name
            quantised += 1
        else:
            assert bits(found.pop(name), tensor), name  # embedding, head, gate, norms, eh_proj
    assert not found and quantised > 50
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert table["weight_block_size"] == [128, 128] and table["quant_method"] == "fp8"
    assert table.get("scale_fmt") == ("ue8m0" if pow2 else None)


def test_large_tensors_are_cut_between_blocks(kit, bits, ref, small, tmp_path, monkeypatch):
    """A matrix that goes through in several blocks of rows has the bytes of one that goes through whole."""
    model = ref.model(ref.config(hidden_size=144, dense_inner_size=700, precision="fp32"))
    saved = kit.save(tmp_path / "run", model)
    whole = kit.read(kit.export(saved, tmp_path / "whole", form="fp8"))
    want = to_hf_state_dict(load_model(tmp_path / "whole", precision="fp32"))
    monkeypatch.setattr(
        "examples.model.hf.tensors.BLOCK_BYTES", 200 * 144 * 4
    )  # 200 rows are no whole blocks
    cut = kit.read(kit.export(saved, tmp_path / "cut", form="fp8"))
    for name, tensor in whole.items():
        assert bits(cut[name], tensor), name
    again = to_hf_state_dict(load_model(tmp_path / "cut", precision="fp32"))
    for name, tensor in want.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("variant", ["plain", "yarn", "no_q_lora", "one_group"])
def test_transformers_computes_equal_logits_fp32(kit, ref, tmp_path, variant):
    model = ref.model(ref.config(**ref.variants[variant]), seed=5)
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp32", shard_bytes=50_000)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    tokens = ref.tokens(2, 30)
    assert ref.relative(model.logits(tokens), theirs(tokens, use_cache=False).logits) < 1e-5


def test_transformers_computes_equal_logits_bf16(kit, ref, tmp_path):
    fp32 = ref.model(ref.config(), seed=3)
    model = Transformer(ref.config(precision="bf16"))
    load_hf_state_dict(model, to_hf_state_dict(fp32))
    theirs = DeepseekV3ForCausalLM.from_pretrained(
        kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf")
    )
    assert theirs.dtype == torch.bfloat16
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, model.routers()[0].bias)
    tokens = ref.tokens(2, 33)
    want = theirs(tokens, use_cache=False).logits.float()
    ours, exact = model.logits(tokens), fp32.logits(tokens)

    def closeness(a, b):
        return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))

    assert closeness(ours, want) > 0.99
    assert 1 - closeness(ours, exact) < 2 * (1 - closeness(want, exact)) + 1e-4


def test_transformers_reads_our_fp8_where_its_block_bug_does_not_bite(kit, ref, tmp_path):
    """All sides whole blocks: transformers 5.23 infers a block as rows // scale rows, which is right only then."""
    pytest.importorskip("accelerate", reason="transformers asks for it to read FP8")
    sides = {
        "hidden_size": 256,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "num_heads": 2,
    }
    sides |= {"qk_nope_head_dim": 64, "v_head_dim": 64, "dense_inner_size": 256, "expert_inner_size": 128}
    sides |= {
        "num_experts": 4,
        "num_groups": 2,
        "top_groups": 1,
        "top_k": 2,
        "num_shared_experts": 1,
        "num_layers": 2,
    }
    model = ref.model(ref.config(mtp_depth=0, precision="bf16", **sides))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder)
    ours = to_hf_state_dict(load_model(folder))
    for name, tensor in theirs.state_dict().items():
        if name in ours and "layernorm" not in name:
            assert torch.equal(tensor.to(ours[name].dtype), ours[name]), name
    stacked = theirs.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(stacked[3], ours["model.layers.1.mlp.experts.3.down_proj.weight"])


def test_average_and_choice_of_mtp(kit, bits, model, saved, tmp_path):
    average = kit.read(kit.export(saved, tmp_path / "ema", weights="ema", form="fp32", mtp=False))
    trained = to_hf_state_dict(model)
    assert average.keys() == {name for name in trained if not name.startswith("model.layers.3.")}
    for name, tensor in average.items():
        bias = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, trained[name].float() * (1 if bias else 2)), name
    assert json.loads((tmp_path / "ema" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_config_is_what_transformers_understands(kit, ref, tmp_path):
    model = ref.model(ref.config(**ref.variants["yarn"]))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    theirs = AutoConfig.from_pretrained(folder)
    rope = theirs.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 8.0, 32)
    assert theirs.num_nextn_predict_layers == 1 and theirs.q_lora_rank == 24
    assert load_model(folder, precision="fp32").config == model.config


def test_model_of_dense_layers_only(kit, ref, tmp_path):
    """Its MTP block is dense too; readers ask layer index >= first_k_dense_replace, of the MTP layer as well."""
    model = ref.model(ref.config(num_dense_layers=3))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp32")
    assert "model.layers.3.mlp.gate_proj.weight" in kit.read(folder)
    assert AutoConfig.from_pretrained(folder).first_k_dense_replace == 4
    assert load_model(folder, precision="fp32").config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "--shard-size: must be at least 1 byte; got 0"),
        ({"pow2_scales": True}, "--scale-format ue8m0: is for --format fp8; got bf16"),
        ({"without_tokenizer": False}, "has no tokenizer; name one with --tokenizer"),
    ],
)
def test_wrong_options(kit, saved, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        kit.export(saved, tmp_path / "hf", **options)
    assert not list(tmp_path.iterdir())


def test_weights_that_fp8_cannot_hold(kit, ref, small, tmp_path):
    model = ref.model(small)
    with torch.no_grad():
        model.layers[2].ffn.experts.down[1, 3, 5] = torch.inf
    with pytest.raises(UserError, match=r"layers.2.mlp.experts.1.down_proj.weight: has infinite or NaN"):
        kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    assert not (tmp_path / "hf").exists()


def test_dequantised_is_the_plain_formula(bits, kit, exported):
    """Conformance (g): a folder whose kv_a ends in a short block, against q * scale written out by hand."""
    stored = kit.read(exported["fp8"])
    model = load_model(exported["fp8"], precision="fp32")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    q, scale = stored[name], stored[name + "_scale_inv"]
    assert q.shape == (144, 144) and scale.shape == (2, 2)
    want = torch.empty(144, 144)
    for i in range(144):
        for j in range(144):
            want[i, j] = q[i, j].float() * scale[i // 128, j // 128]
    assert bits(to_hf_state_dict(model)[name], want)
    assert bits(
        to_hf_state_dict(load_model(exported["fp8"]))[name],
        dequantize_128x128(q, scale, dtype=torch.bfloat16),
    )
