"""config.json of a released checkpoint, both ways.

Written in the released form (`rope_theta` and `rope_scaling`), which transformers, vLLM and SGLang of any age read.
Read strictly: a setting that would make our model compute something else is an error that names it, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from examples.errors import UserError
from examples.model.config import ModelConfig, Precision, YarnConfig

Format = Literal["fp32", "bf16", "fp8"]
BLOCK = 128

# What config.json calls our fields. `num_key_value_heads` is theirs only: MLA has no groups of keys.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "dense_inner_size",
    "moe_intermediate_size": "expert_inner_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "n_shared_experts": "num_shared_experts",
    "n_routed_experts": "num_experts",
    "routed_scaling_factor": "routed_scale",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "n_group": "num_groups",
    "topk_group": "top_groups",
    "num_experts_per_tok": "top_k",
    "max_position_embeddings": "max_positions",
    "initializer_range": "init_std",
    "rms_norm_eps": "norm_eps",
}
_OPTIONAL = ("initializer_range",)
# Settings that our model has in one form only, with that form; a file may leave them out.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}


def hf_config(config: ModelConfig, *, bos: int = 0, eos: int = 1) -> dict[str, Any]:
    """The `config.json` that goes with these weights, without type or quantisation (see `folder_config`)."""
    yarn = config.yarn
    scaling = None
    if yarn is not None:
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
        }
    # Where all layers are dense our MTP block is too; theirs asks the same rule about its own index.
    all_dense = config.num_dense_layers == config.num_layers
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "first_k_dense_replace": config.num_dense_layers + (config.mtp_depth if all_dense else 0),
        "num_nextn_predict_layers": config.mtp_depth,
        "num_key_value_heads": config.num_heads,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def folder_config(
    config: ModelConfig, form: Format, *, pow2_scales: bool = False, bos: int = 0, eos: int = 1
) -> dict[str, Any]:
    """`hf_config` with the type of the weights and, for FP8, `quantization_config` as released (V3.1's when pow2)."""
    values = hf_config(config, bos=bos, eos=eos)
    values["torch_dtype"] = "float32" if form == "fp32" else "bfloat16"
    if form == "fp8":
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            **({"scale_fmt": "ue8m0"} if pow2_scales else {}),
        }
    return values


def model_config(
    values: Mapping[str, Any], where: str, *, precision: Precision, mtp: bool = True
) -> ModelConfig:
    """The model that a `config.json` describes. mtp: with its MTP modules.

    Raises `UserError`, which begins with `where`, for a setting that is missing or that our model does not have.
    """
    if values.get("model_type") != "deepseek_v3":
        raise UserError(f"{where}: model_type must be 'deepseek_v3'; got {values.get('model_type')!r}")
    for key, allowed in _FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} must be {allowed[0]!r} for this model; got {values[key]!r}")
    _check_quantization(values.get("quantization_config"), where)
    required = [key for key in _FIELDS if key not in _OPTIONAL]
    for key in [*required, "first_k_dense_replace"]:
        if key not in values:
            raise UserError(f"{where}: {key} is missing")
    if values.get("num_key_value_heads", values["num_attention_heads"]) != values["num_attention_heads"]:
        raise UserError(
            f"{where}: num_key_value_heads must be num_attention_heads = {values['num_attention_heads']}; "
            f"got {values['num_key_value_heads']}"
        )
    floats = ("routed_scaling_factor", "initializer_range", "rms_norm_eps")
    built: dict[str, Any] = {}
    for theirs, ours in _FIELDS.items():
        if theirs in values:
            value = values[theirs]
            built[ours] = value if theirs not in floats or not isinstance(value, int) else float(value)
    theta, yarn = _rope(values, where)
    depth = values.get("num_nextn_predict_layers", values.get("num_mtp_layers", 0))
    built |= {
        "num_dense_layers": min(values["first_k_dense_replace"], values["num_hidden_layers"]),
        "mtp_depth": depth if mtp else 0,
        "rope_theta": theta,
        "yarn": yarn,
        "precision": precision,
    }
    try:
        return ModelConfig.from_dict(built)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, YarnConfig | None]:
    """Both forms: `rope_theta` with `rope_scaling`, and the `rope_parameters` of transformers 5."""
    table = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = table.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        raise UserError(f"{where}: rope_theta is missing")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise UserError(f"{where}: RoPE must be 'default' or 'yarn'; got {kind!r}")
    mscale = table.get("mscale_all_dim", 0)
    if mscale != table.get("mscale", mscale) or not mscale:
        raise UserError(
            f"{where}: mscale and mscale_all_dim must be equal and not 0; got {table.get('mscale')} and {mscale}"
        )
    try:
        return float(theta), YarnConfig(
            factor=float(table["factor"]),
            original_max=int(table["original_max_position_embeddings"]),
            beta_fast=float(table.get("beta_fast", 32)),
            beta_slow=float(table.get("beta_slow", 1)),
            mscale=float(mscale),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: the YaRN table lacks or garbles {error}") from None


def _check_quantization(table: Any, where: str) -> None:
    if table is None:
        return
    name = f"{where}: quantization_config"
    wanted = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    for key, value in wanted.items():
        if not isinstance(table, Mapping) or table.get(key) != value:
            found = table.get(key) if isinstance(table, Mapping) else table
            raise UserError(f"{name}.{key}: must be {value!r}; got {found!r}")
    if table.get("fmt", "e4m3") != "e4m3":
        raise UserError(f"{name}.fmt: must be 'e4m3'; got {table['fmt']!r}")
    if table.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise UserError(f"{name}.scale_fmt: must be 'float' or 'ue8m0'; got {table['scale_fmt']!r}")
