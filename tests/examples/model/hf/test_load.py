"""What we read: round trips to the bit, and one line that names tensor and file for everything that does not fit."""

import json
import re
import shutil

import pytest
import torch

from deepseek_ops.quantize import dequantize_128x128, quantize_128x128
from examples.errors import UserError
from examples.model.hf import load_hf_state_dict, to_hf_state_dict
from examples.model.hf.checkpoint import CheckpointWeights, load_weights
from examples.model.hf.load import FolderWeights, import_checkpoint, load_model
from examples.model.transformer import Transformer
from examples.train.checkpoint import load_checkpoint, seal_checkpoint

GATE_UP = "model.layers.1.mlp.experts.2.up_proj.weight"
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def states(model):
    return to_hf_state_dict(model, shared_copies=True)


def test_bf16_round_trip_to_model_and_to_checkpoint(bits, model, exported, tmp_path):
    back = load_model(exported["bf16"])
    assert back.config == model.config
    path = import_checkpoint(exported["bf16"], tmp_path / "in", shard_bytes=100_000, quiet=True)
    assert len(list(path.glob("*.safetensors"))) > 3
    stored = load_checkpoint(path).tensors["model"]  # by the training code, checksums and all
    for name, tensor in model.state_dict().items():
        assert bits(back.state_dict()[name], tensor), name
        assert bits(stored[name], tensor), name
    other = Transformer(model.config)
    assert load_weights(other, path).step == 0
    assert all(bits(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_export_of_an_import_is_the_same_bytes(kit, exported, tmp_path):
    path = import_checkpoint(exported["bf16"], tmp_path / "in", quiet=True)
    again = kit.export(path, tmp_path / "again", shard_bytes=60_000)
    for file in exported["bf16"].glob("model*"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("pow2", [False, True])
def test_fp8_round_trip(kit, bits, model, saved, tmp_path, pow2):
    """FP32 masters are exactly q * scale; quantising them gives q and fp32 scales again (values, for powers of two)."""
    folder = kit.export(saved, tmp_path / "fp8", form="fp8", pow2_scales=pow2)
    path = import_checkpoint(folder, tmp_path / "in", precision="fp32", quiet=True)
    first, second = kit.read(folder), kit.read(kit.export(path, tmp_path / "b", form="fp8", pow2_scales=pow2))
    assert first.keys() == second.keys()
    masters = states(load_model(folder, precision="fp32"))
    for name, tensor in first.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = first[name + "_scale_inv"]
            assert bits(masters[name], dequantize_128x128(tensor, scale)), name
            if pow2:
                again = dequantize_128x128(second[name], second[name + "_scale_inv"])
                assert torch.equal(again, masters[name]), name
        if not pow2:
            assert bits(second[name], tensor), name


def test_fp32_scales_survive_requantisation():
    """Scales are amax / 448; 448 * scale rounds to amax, or to what divides back. Many scales, both sides of 8/7."""
    torch.manual_seed(0)
    w = torch.randn(128 * 24, 128 * 24) * torch.rand(24, 24).repeat_interleave(128, 0).repeat_interleave(
        128, 1
    )
    q, scale = quantize_128x128(w)
    q2, scale2 = quantize_128x128(dequantize_128x128(q, scale))
    assert torch.equal(scale, scale2) and torch.equal(q.view(torch.uint8), q2.view(torch.uint8))


def test_precision_fp8_has_masters_that_compute_what_the_folder_says(kit, ref, bits, tmp_path):
    """The FP8 Linear quantises its master again: to the folder's own bytes, where our matrix is one of theirs."""
    model = ref.model(ref.config(hidden_size=144, precision="bf16"))
    folder = kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp8")
    stored, back = kit.read(folder), load_model(folder, precision="fp8")
    linear = back.layers[1].attn.o
    assert linear.weight.dtype == torch.float32
    q, scale = quantize_128x128(linear.weight.detach())
    name = "model.layers.1.self_attn.o_proj.weight"
    assert bits(q, stored[name]) and bits(scale, stored[name + "_scale_inv"])
    assert back.embed.weight.dtype == torch.bfloat16
    other = Transformer(back.config)
    load_hf_state_dict(other, to_hf_state_dict(load_model(folder, precision="fp32")))
    tokens = ref.tokens(1, 12)
    assert torch.equal(back.logits(tokens), other.logits(tokens))


def test_scales_in_ue8m0_and_weights_in_float16(kit, copy):
    """Forms that other writers give: scales as exponents only; one tensor in half precision."""
    folder = copy("fp8")
    stored = kit.read(folder)
    name = KV_A + "_scale_inv"
    stored[name] = torch.tensor([[0.5, 2.0], [4.0, 0.125]]).to(torch.float8_e8m0fnu)
    stored["model.norm.weight"] = stored["model.norm.weight"].half()
    kit.write(folder, stored)
    weights = states(load_model(folder, precision="fp32"))
    assert torch.equal(weights[KV_A], dequantize_128x128(stored[KV_A], stored[name].float()))
    assert torch.equal(weights["model.norm.weight"], stored["model.norm.weight"].float())


def test_without_mtp(kit, model, copy, tmp_path):
    folder = copy()
    kit.write(folder, {n: t for n, t in kit.read(folder).items() if not n.startswith("model.layers.3.")})
    with pytest.raises(
        UserError, match=r"layers.3.enorm.weight is missing \(and .*--no-mtp imports the model"
    ):
        FolderWeights(folder)
    main = load_model(folder, mtp=False)
    assert main.config.mtp_depth == 0 and torch.equal(main.head.weight, model.head.weight)


def change(kit, folder, edit):
    tensors = kit.read(folder)
    edit(tensors)
    kit.write(folder, tensors)


TENSOR_FAULTS = {
    "missing": ("bf16", lambda t: t.pop(GATE_UP), f"{re.escape(GATE_UP)} is missing$"),
    "unexpected": (
        "bf16",
        lambda t: t.update({GATE_UP.replace("up_proj", "upp_proj"): t[GATE_UP]}),
        f"upp_proj.weight has no place in this model; the nearest name is {re.escape(GATE_UP)}",
    ),
    "another layer": (
        "bf16",
        lambda t: t.update({"model.layers.9.hnorm.weight": t["model.norm.weight"]}),
        "model.safetensors: model.layers.9.hnorm.weight has no place",
    ),
    "shape": (
        "bf16",
        lambda t: t.update({GATE_UP: t[GATE_UP][:, 1:]}),
        rf"model.safetensors: {re.escape(GATE_UP)} must have shape \(40, 144\); got \(40, 143\)",
    ),
    "type": (
        "bf16",
        lambda t: t.update({GATE_UP: t[GATE_UP].long()}),
        f"{re.escape(GATE_UP)} must be float32, bfloat16, float16 or FP8; got int64",
    ),
    "no scales": (
        "fp8",
        lambda t: t.pop(KV_A + "_scale_inv"),
        "kv_a_proj_with_mqa.weight is FP8, but its scales .*_scale_inv are missing",
    ),
    "floor instead of ceil": (
        "fp8",
        lambda t: t.update({KV_A + "_scale_inv": t[KV_A + "_scale_inv"][:1]}),
        r"kv_a_proj_with_mqa.weight_scale_inv must be float32 \[2, 2\].*got float32 \[1, 2\]",
    ),
    "scales of what is not FP8": (
        "fp8",
        lambda t: t.update({KV_A: t[KV_A].bfloat16()}),
        "kv_a_proj_with_mqa.weight_scale_inv has no place .* is not FP8, so it has no scales",
    ),
    "a copy that is none": (
        "bf16",
        lambda t: t.update({"model.layers.3.shared_head.head.weight": t["lm_head.weight"] + 1}),
        "layers.3.shared_head.head.weight must equal lm_head.weight",
    ),
    "scale 0": (
        "fp8",
        lambda t: t[KV_A + "_scale_inv"].zero_(),
        "kv_a_proj_with_mqa.weight_scale_inv: scales must be positive and finite",
    ),
    "nan": (
        "bf16",
        lambda t: t[GATE_UP].fill_(torch.nan),
        f"{re.escape(GATE_UP)}: has infinite or NaN values",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_every_tensor_is_accounted_for(kit, copy, tmp_path, fault):
    form, edit, message = TENSOR_FAULTS[fault]
    folder = copy(form)
    change(kit, folder, edit)
    with pytest.raises(UserError, match=message):
        import_checkpoint(folder, tmp_path / "in", quiet=True)
    assert not list((tmp_path / "in").glob("checkpoints/step*"))
    with pytest.raises(UserError, match=message):
        load_model(folder)


def _edit_json(folder, name, **changes):
    values = json.loads((folder / name).read_text())
    values.update(changes)
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def _move_in_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index[GATE_UP] = "model-00001-of-" + index[GATE_UP].split("-of-")[1]
    _edit_json(folder, "model.safetensors.index.json", weight_map=index)


def _forget_in_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    del index[GATE_UP]
    _edit_json(folder, "model.safetensors.index.json", weight_map=index)


def _second(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def _write(file, content):
    file.write_bytes(content)


FILE_FAULTS = {
    "truncated": (
        lambda f: _write(_second(f), _second(f).read_bytes()[:-9]),
        r"00002-of-\d+.safetensors: is truncated or extended, \d+ bytes where its header promises \d+",
    ),
    "truncated header": (
        lambda f: _write(_second(f), _second(f).read_bytes()[:50]),
        "truncated inside its header",
    ),
    "empty": (lambda f: _write(_second(f), b""), "truncated inside its header"),
    "garbled header": (
        lambda f: _write(_second(f), _second(f).read_bytes().replace(b'"dtype"', b'"dtyqe"', 1)),
        "safetensors header is damaged",
    ),
    "overlap": (
        lambda f: _write(
            _second(f), re.sub(rb'offsets":\[0,', b'offsets":[2,', _second(f).read_bytes(), count=1)
        ),
        "shape and byte range disagree",
    ),
    "shard gone": (
        lambda f: _second(f).unlink(),
        r"00002-of-\d+.safetensors: is missing; .*keeps model.layers",
    ),
    "index puts a tensor elsewhere": (
        _move_in_index,
        "which model.safetensors.index.json puts in model-00001",
    ),
    "index forgets a tensor": (_forget_in_index, f"holds {re.escape(GATE_UP)}, which .* puts nowhere"),
    "index leaves the folder": (
        lambda f: _edit_json(f, "model.safetensors.index.json", weight_map={"a": "../../x.safetensors"}),
        "files must be plain",
    ),
    "index is no JSON": (lambda f: _write(f / "model.safetensors.index.json", b"{"), "not valid JSON"),
    "a shard too many": (
        lambda f: shutil.copy(_second(f), f / "model-extra.safetensors"),
        "extra.safetensors: is not in model.safetensors.index.json",
    ),
    "only a pickle": (
        lambda f: [p.unlink() for p in f.glob("model*")] and _write(f / "pytorch_model.bin", b""),
        "pytorch_model.bin is a pickle, which can run code",
    ),
    "another model": (
        lambda f: _edit_json(f, "config.json", model_type="llama"),
        "must be 'deepseek_v3'; got 'llama'",
    ),
    "softmax routing": (
        lambda f: _edit_json(f, "config.json", scoring_func="softmax"),
        "config.json: scoring_func must be 'sigmoid'",
    ),
    "a key gone": (lambda f: _edit_json(f, "config.json", n_group=...), "n_group is missing"),
    "a word for a number": (
        lambda f: _edit_json(f, "config.json", hidden_size="64"),
        "model.hidden_size: must be",
    ),
    "another RoPE": (
        lambda f: _edit_json(f, "config.json", rope_scaling={"type": "linear", "factor": 2.0}),
        "RoPE must be 'default' or 'yarn'; got 'linear'",
    ),
    "another quantisation": (
        lambda f: _edit_json(f, "config.json", quantization_config={"quant_method": "awq"}),
        "quantization_config.quant_method: must be 'fp8'; got 'awq'",
    ),
    "more layers": (lambda f: _edit_json(f, "config.json", num_hidden_layers=4), "is missing"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damaged_folders(copy, fault):
    spoil, message = FILE_FAULTS[fault]
    folder = copy()
    spoil(folder)
    with pytest.raises(UserError, match=message):
        FolderWeights(folder)


def test_transformers_own_form_of_rope(kit, ref, tmp_path):
    """What transformers 5 itself saves has rope_parameters; one file without an index."""
    from transformers import DeepseekV3ForCausalLM

    model = ref.model(ref.config(mtp_depth=0, **ref.variants["yarn"]))
    theirs = DeepseekV3ForCausalLM.from_pretrained(
        kit.export(kit.save(tmp_path / "run", model), tmp_path / "hf", form="fp32")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    back = load_model(tmp_path / "theirs", precision="fp32", mtp=False)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_checkpoint_of_many_ranks(kit, bits, saved, exported, tmp_path):
    """Parts of tensors, cut along either axis and scattered over files, read as the whole."""
    from safetensors.torch import save_file

    tensors = kit.read(saved)
    ranks = [{}, {}]
    places = [{}, {}]
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        axis = i % 2 if tensor.ndim > 1 else 0
        cut = (tensor.shape[axis] + 2) // 3
        for rank, part in enumerate(tensor.split([cut, tensor.shape[axis] - cut], dim=axis)):
            ranks[rank][name] = part.contiguous()
            places[rank][name] = {
                "saved_offsets": [rank * cut if a == axis else 0 for a in range(tensor.ndim)]
            }
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    for rank in (0, 1):
        metadata = {"DCP_SHARDING_INFO": json.dumps(places[rank])}
        save_file(
            ranks[rank], folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=metadata
        )
    meta = json.loads((next(saved.rglob("meta.json"))).read_text())
    seal_checkpoint(folder, 7, meta)
    found = kit.read(kit.export(folder, tmp_path / "hf"))
    for name, tensor in kit.read(exported["bf16"]).items():
        assert bits(found[name], tensor), name
    ranks[1].pop("model/embed.weight")
    del places[1]["model/embed.weight"]
    metadata = {"DCP_SHARDING_INFO": json.dumps(places[1])}
    save_file(ranks[1], folder / "shard-00002-model-00001-of-00001.safetensors", metadata=metadata)
    (folder / "manifest.json").unlink()
    seal_checkpoint(folder, 7, meta)
    with pytest.raises(UserError, match=r"embed.weight' must have shape"):
        CheckpointWeights(folder)


def test_load_weights_of_a_larger_and_another_model(ref, small, model, saved):
    from dataclasses import replace

    main = Transformer(replace(small, mtp_depth=0, precision="fp32"))
    load_weights(main, saved)
    assert torch.equal(main.head.weight, model.head.weight.float())
    average = Transformer(replace(small, precision="fp32"))
    load_weights(average, saved, weights="ema")
    assert torch.equal(average.head.weight, 2 * model.head.weight.float())
    assert torch.equal(average.routers()[0].bias, model.routers()[0].bias)
    with pytest.raises(UserError, match=r"embed.weight is \(97, 144\) there and \(98, 144\) in this model"):
        load_weights(Transformer(replace(small, vocab_size=98)), saved)
    with pytest.raises(UserError, match=r"mtp.1.emb_norm.weight is absent there"):
        load_weights(Transformer(replace(small, mtp_depth=2)), saved)
