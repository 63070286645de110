"""FLOPs, bytes and parameters of one block of the model, per token, counted from its shapes.

A *block* is what a pipeline stage is made of: the embedding, a dense or MoE layer, an MTP module, or the output head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from examples.model.config import ModelConfig

Kind = Literal["embedding", "dense", "moe", "mtp", "head"]

# FLOPs of the passes over one weight and one token.
_PASS = 2


@dataclass(frozen=True)
class BlockCosts:
    """One block, per token of training. FLOPs count a multiply-add as 2; bytes are those of HBM.

    fp8_dense, fp8_grouped, bf16: forward FLOPs of the Linears of each sort; Dgrad and Wgrad cost as much again, each.
    recomputed: FP8 forward FLOPs that backward repeats (MLA up-projections, section 3.2.3).
    repeated: FP8 forward FLOPs that other ranks do too, where they share a sequence: keys and values of the whole sequence are
    made from its latents on each of them (moving latents costs 576 values per token, moving heads 49,152).
    attention: forward FLOPs of the causal products at the given length; attention_backward: five products for two.
    memory_forward, memory_backward: bytes that everything else reads and writes; memory_routed: the share of them that
    belongs to rows of routed experts.
    parameters: all but the routed experts'; expert_parameters: of all routed experts together.
    fp8_parameters: those of `parameters` that compute in FP8. routed: whether tokens travel to experts.
    """

    kind: Kind
    parameters: float
    fp8_parameters: float
    expert_parameters: float = 0
    fp8_dense: float = 0
    fp8_grouped: float = 0
    bf16: float = 0
    recomputed: float = 0
    repeated: float = 0
    attention: float = 0
    attention_backward: float = 0
    memory_forward: float = 0
    memory_backward: float = 0
    memory_routed: float = 0
    routed: bool = False

    @property
    def model_flops(self) -> float:
        """What the mathematics needs, forward and backward: three passes over Linears and attention, nothing twice."""
        return 3 * (self.fp8_dense + self.fp8_grouped + self.bf16 + self.attention)


def mla_parameters(c: ModelConfig) -> dict[str, int]:
    """Weights of MLA's Linears."""
    heads, up = c.num_heads, c.qk_nope_head_dim + c.v_head_dim
    queries = (
        {"q_a": c.hidden_size * c.q_lora_rank, "q_b": c.q_lora_rank * heads * c.qk_head_dim}
        if c.q_lora_rank
        else {"q": c.hidden_size * heads * c.qk_head_dim}
    )
    return {
        **queries,
        "kv_a": c.hidden_size * c.latent_width,
        "kv_b": c.kv_lora_rank * heads * up,
        "o": heads * c.v_head_dim * c.hidden_size,
    }


def expert_parameters(c: ModelConfig) -> int:
    """Weights of one routed expert: gate, up and down projection."""
    return 3 * c.hidden_size * c.expert_inner_size


def layer(
    c: ModelConfig, kind: Literal["dense", "moe"], seq_len: int, context_parallel: int = 1
) -> BlockCosts:
    """A transformer layer at sequences of `seq_len` tokens, each shared by `context_parallel` ranks."""
    mla = mla_parameters(c)
    norms = 2 * c.hidden_size + (c.q_lora_rank or 0) + c.kv_lora_rank
    moe = kind == "moe"
    inner = c.num_shared_experts * c.expert_inner_size if moe else c.dense_inner_size
    dense = sum(mla.values()) + 3 * c.hidden_size * inner
    gate = c.hidden_size * c.num_experts if moe else 0
    context = (seq_len + 1) / 2  # tokens that a token sees on average; causal kernels skip the rest
    score, value = c.num_heads * c.qk_head_dim, c.num_heads * c.v_head_dim
    others = context_parallel - 1
    here = _memory_forward(c, inner, False)
    keys = others * 2 * 2 * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)  # bytes, read and written
    forward = _memory_forward(c, inner, moe) + keys
    fp8 = c.precision == "fp8"
    return BlockCosts(
        kind=kind,
        parameters=dense + gate + norms,
        fp8_parameters=dense if fp8 else 0,
        expert_parameters=c.num_experts * expert_parameters(c) if moe else 0,
        fp8_dense=_PASS * dense,
        fp8_grouped=_PASS * c.top_k * expert_parameters(c) if moe else 0,
        bf16=_PASS * c.hidden_size * c.num_experts if moe else 0,
        recomputed=_PASS * (mla.get("q_b", 0) + context_parallel * mla["kv_b"]) if c.recompute else 0,
        repeated=_PASS * others * mla["kv_b"],
        attention=_PASS * (score + value) * context,
        attention_backward=_PASS * (3 * score + 2 * value) * context,
        memory_forward=forward,
        # Gradients of every tensor beside the tensor, and what Wgrad reads turned from 1x128 to 128x1.
        memory_backward=2 * forward + (2 if fp8 else 0) * _linear_widths(c, inner, moe),
        memory_routed=1 - (here + keys) / forward,
        routed=moe,
    )


def _memory_forward(c: ModelConfig, inner: int, moe: bool) -> float:
    """Bytes that norms, casts, rotary, SwiGLU, permutation and residuals move in the forward pass of one token."""
    d, wide, code = c.hidden_size, 2, 1 if c.precision == "fp8" else 2
    heads = c.num_heads * (c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim)
    norm = 2 * wide + code  # reads the residual, writes bf16 and codes
    total = 2 * norm * d + 2 * 3 * wide * d  # two norms, two residual additions
    total += norm * ((c.q_lora_rank or 0) + c.kv_lora_rank)
    total += 2 * wide * heads  # rotary and the layout that attention wants
    total += (wide + code) * c.num_heads * c.v_head_dim
    total += (2 * wide + code) * inner  # SwiGLU: gate, up, product
    if moe:
        k = c.top_k
        total += 2 * code * k * d  # received rows to their experts
        total += (2 * wide + code) * k * c.expert_inner_size
        total += wide * (k + 1) * d  # weighted sum of the choices
    return total


def _linear_widths(c: ModelConfig, inner: int, moe: bool) -> float:
    """Values per token at the inputs and outputs of all Linears."""
    d, heads = c.hidden_size, c.num_heads
    q = c.q_lora_rank or 0
    mla = 2 * d + 2 * q + heads * c.qk_head_dim + c.latent_width + c.kv_lora_rank
    mla += heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim + d
    ffn = 2 * d + 3 * inner
    routed = c.top_k * (2 * d + 3 * c.expert_inner_size) if moe else 0
    return mla + ffn + routed


def head(c: ModelConfig) -> BlockCosts:
    """Final norm, output head and loss: BF16 (section 3.3.1). Logits are written and read twice."""
    return BlockCosts(
        kind="head",
        parameters=c.vocab_size * c.hidden_size + c.hidden_size,
        fp8_parameters=0,
        bf16=_PASS * c.vocab_size * c.hidden_size,
        memory_forward=2 * 2 * c.vocab_size + 4 * 2 * c.hidden_size,
        memory_backward=2 * 2 * c.vocab_size + 4 * 2 * c.hidden_size,
    )


def embedding(c: ModelConfig) -> BlockCosts:
    """The input table: a row is read and its gradient added in FP32."""
    return BlockCosts(
        kind="embedding",
        parameters=c.vocab_size * c.hidden_size,
        fp8_parameters=0,
        memory_forward=4 * c.hidden_size,
        memory_backward=(2 + 8) * c.hidden_size,
    )


def mtp(c: ModelConfig, seq_len: int, context_parallel: int = 1) -> BlockCosts:
    """One MTP module (section 2.2): a layer, the projection of two states to one, three norms; its own pass of the head.

    Embedding and head are shared with the main model and add no parameters.
    """
    block = layer(c, "moe" if c.num_moe_layers else "dense", seq_len, context_parallel)
    d = c.hidden_size
    again = head(c)
    return BlockCosts(
        kind="mtp",
        parameters=block.parameters + 2 * d * d + 3 * d,
        fp8_parameters=block.fp8_parameters + (2 * d * d if c.precision == "fp8" else 0),
        expert_parameters=block.expert_parameters,
        fp8_dense=block.fp8_dense + _PASS * 2 * d * d,
        fp8_grouped=block.fp8_grouped,
        bf16=block.bf16 + again.bf16,
        recomputed=block.recomputed,
        repeated=block.repeated,
        attention=block.attention,
        attention_backward=block.attention_backward,
        memory_forward=block.memory_forward + again.memory_forward + 15 * d,
        memory_backward=block.memory_backward + again.memory_backward + 30 * d,
        memory_routed=block.memory_routed,
        routed=block.routed,
    )


def blocks(c: ModelConfig, seq_len: int, context_parallel: int = 1) -> Iterator[BlockCosts]:
    """The whole model in order: embedding, layers, head, MTP modules."""
    yield embedding(c)
    dense, moe = (layer(c, kind, seq_len, context_parallel) for kind in ("dense", "moe"))
    for index in range(c.num_layers):
        yield dense if index < c.num_dense_layers else moe
    yield head(c)
    for _ in range(c.mtp_depth):
        yield mtp(c, seq_len, context_parallel)


@dataclass(frozen=True)
class Totals:
    """Of a whole model: what people quote. MTP modules are not part of it, as in the report."""

    parameters: float
    active_parameters: float
    mtp_parameters: float
    flops_per_token: float  # forward and backward, at the given length
    mtp_flops_per_token: float


def totals(c: ModelConfig, seq_len: int) -> Totals:
    """Parameters and model FLOPs per token."""
    main = [b for b in blocks(c, seq_len) if b.kind != "mtp"]
    extra = [b for b in blocks(c, seq_len) if b.kind == "mtp"]
    every = sum(b.parameters + b.expert_parameters for b in main)
    idle = c.num_moe_layers * (c.num_experts - c.top_k) * expert_parameters(c)
    return Totals(
        parameters=every,
        active_parameters=every - idle,
        mtp_parameters=sum(b.parameters + b.expert_parameters for b in extra),
        flops_per_token=sum(b.model_flops for b in main),
        mtp_flops_per_token=sum(b.model_flops for b in extra),
    )
