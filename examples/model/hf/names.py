"""Weights in the names and shapes of the released checkpoint (and of transformers' DeepseekV3ForCausalLM).

What differs: the released files keep gate and up, q_a and kv_a, and every expert apart; here they are one matrix each,
because they are one GEMM. The MTP module k is layer `num_layers + k - 1` there. Files, shards and FP8 scales are the
other modules' work; this one only knows names, and moves state dicts that are in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import torch

from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.transformer import Transformer

# (HF name, our name, index of the expert or None, first row, rows); rows None: the whole tensor.
Piece = tuple[str, str, int | None, int, int | None]


def to_hf_state_dict(model: Transformer, *, shared_copies: bool = False) -> dict[str, torch.Tensor]:
    """All weights under their HF names: views, not copies. Routing biases are included, token counts are not.

    shared_copies: also write the MTP modules' copies of embedding and head, as the released files do.
    """
    ours = _tensors(model)
    state = hf_views(model.config, {name: tensor.detach() for name, tensor in ours.items()})
    if shared_copies:
        for name, our in mtp_copies(model.config):
            state[name] = ours[our].detach()
    return state


def hf_views(config: ModelConfig, ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under our names (weights, or gradients of some) as views under HF names; absent ones are left out."""
    present = (piece for piece in pieces(config) if piece[1] in ours)
    return {name: view(ours[our], expert, start, rows) for name, our, expert, start, rows in present}


@torch.no_grad()
def load_hf_state_dict(model: Transformer, state: Mapping[str, torch.Tensor]) -> None:
    """Copy weights with HF names into the model, casting to its types. Nothing is written unless everything fits.

    Copies of embedding and head beside the MTP modules are accepted if they agree. Raises `UserError` for a tensor that
    is missing, unexpected, or of another shape, naming the tensor.
    """
    ours = _tensors(model)
    targets = {
        name: view(ours[our], expert, start, rows) for name, our, expert, start, rows in pieces(model.config)
    }
    copies = dict(mtp_copies(model.config))
    missing = sorted(targets.keys() - state.keys())
    if missing:
        raise UserError(f"weights: {missing[0]} is missing{_more(missing)}")
    unexpected = sorted(state.keys() - targets.keys() - copies.keys())
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], targets, n=1)
        advice = f"; the nearest name is {near[0]}" if near else ""
        raise UserError(f"weights: {unexpected[0]} has no place in this model{_more(unexpected)}{advice}")
    hf_names = {our: name for name, our, *_ in pieces(model.config)}
    for name, tensor in state.items():
        want = targets[name] if name in targets else ours[copies[name]]
        if tensor.shape != want.shape:
            raise UserError(f"weights: {name} must have shape {tuple(want.shape)}; got {tuple(tensor.shape)}")
        if name in copies and not torch.equal(tensor, state[hf_names[copies[name]]]):
            raise UserError(
                f"weights: {name} must equal {hf_names[copies[name]]}, which the MTP module shares"
            )
    for name, target in targets.items():
        target.copy_(state[name])


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """Every tensor of the HF layout and the part of ours that it is. Pieces of one of ours come in its row order, so
    that written one after the other they are its bytes."""
    yield "model.embed_tokens.weight", "embed.weight", None, 0, None
    for i in range(config.num_layers):
        yield from _block(config, f"model.layers.{i}", f"layers.{i}", dense=i < config.num_dense_layers)
    yield "model.norm.weight", "norm.weight", None, 0, None
    yield "lm_head.weight", "head.weight", None, 0, None
    for k in range(config.mtp_depth):
        hf, our = f"model.layers.{config.num_layers + k}", f"mtp.{k}"
        yield f"{hf}.enorm.weight", f"{our}.emb_norm.weight", None, 0, None
        yield f"{hf}.hnorm.weight", f"{our}.hidden_norm.weight", None, 0, None
        yield f"{hf}.eh_proj.weight", f"{our}.proj.weight", None, 0, None
        yield from _block(config, hf, f"{our}.block", dense=config.num_dense_layers >= config.num_layers)
        yield f"{hf}.shared_head.norm.weight", f"{our}.norm.weight", None, 0, None


def _block(config: ModelConfig, hf: str, our: str, *, dense: bool) -> Iterator[Piece]:
    yield f"{hf}.input_layernorm.weight", f"{our}.attn_norm.weight", None, 0, None
    attn = f"{hf}.self_attn"
    if config.q_lora_rank:
        q_rank = config.q_lora_rank
        yield f"{attn}.q_a_proj.weight", f"{our}.attn.qkv_a.weight", None, 0, q_rank
        yield f"{attn}.q_a_layernorm.weight", f"{our}.attn.q_norm.weight", None, 0, None
        yield f"{attn}.q_b_proj.weight", f"{our}.attn.q_b.weight", None, 0, None
        yield (
            f"{attn}.kv_a_proj_with_mqa.weight",
            f"{our}.attn.qkv_a.weight",
            None,
            q_rank,
            config.latent_width,
        )
    else:
        yield f"{attn}.q_proj.weight", f"{our}.attn.q.weight", None, 0, None
        yield f"{attn}.kv_a_proj_with_mqa.weight", f"{our}.attn.kv_a.weight", None, 0, None
    yield f"{attn}.kv_a_layernorm.weight", f"{our}.attn.kv_norm.weight", None, 0, None
    yield f"{attn}.kv_b_proj.weight", f"{our}.attn.kv_b.weight", None, 0, None
    yield f"{attn}.o_proj.weight", f"{our}.attn.o.weight", None, 0, None
    yield f"{hf}.post_attention_layernorm.weight", f"{our}.ffn_norm.weight", None, 0, None
    if dense:
        yield from _swiglu(f"{hf}.mlp", f"{our}.ffn", config.dense_inner_size)
        return
    yield f"{hf}.mlp.gate.weight", f"{our}.ffn.router.weight", None, 0, None
    yield f"{hf}.mlp.gate.e_score_correction_bias", f"{our}.ffn.router.bias", None, 0, None
    inner = config.expert_inner_size
    for e in range(config.num_experts):
        expert = f"{hf}.mlp.experts.{e}"
        yield f"{expert}.gate_proj.weight", f"{our}.ffn.experts.gate_up", e, 0, inner
        yield f"{expert}.up_proj.weight", f"{our}.ffn.experts.gate_up", e, inner, inner
        yield f"{expert}.down_proj.weight", f"{our}.ffn.experts.down", e, 0, None
    if config.num_shared_experts:
        yield from _swiglu(f"{hf}.mlp.shared_experts", f"{our}.ffn.shared", config.num_shared_experts * inner)


def _swiglu(hf: str, our: str, inner: int) -> Iterator[Piece]:
    yield f"{hf}.gate_proj.weight", f"{our}.gate_up.weight", None, 0, inner
    yield f"{hf}.up_proj.weight", f"{our}.gate_up.weight", None, inner, inner
    yield f"{hf}.down_proj.weight", f"{our}.down.weight", None, 0, None


def mtp_copies(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(HF name, our name) of the copies of embedding and head that the released files keep beside MTP modules."""
    for k in range(config.mtp_depth):
        yield f"model.layers.{config.num_layers + k}.embed_tokens.weight", "embed.weight"
        yield f"model.layers.{config.num_layers + k}.shared_head.head.weight", "head.weight"


def piece_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor, copies left out; built on the meta device, without memory."""
    ours = our_tensors(config)
    return {
        name: tuple(view(ours[our], expert, start, rows).shape)
        for name, our, expert, start, rows in pieces(config)
    }


def our_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our name -> meta tensor (shape and type) of every parameter and buffer of the model."""
    with torch.device("meta"):
        return {n: t.detach() for n, t in _tensors(Transformer(config)).items()}


def _tensors(model: Transformer) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def view(tensor: torch.Tensor, expert: int | None, start: int, rows: int | None) -> torch.Tensor:
    if expert is not None:
        tensor = tensor[expert]
    return tensor if rows is None else tensor[start : start + rows]


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
