"""Generation's passes of the Transformer in as few calls as its equations allow.

A step takes a few rows through the whole model: what it costs on a CPU is the number of calls, not their arithmetic.
`DecodePlan` is the model's equations once more, over weights laid out for that:

    MLA     the absorbed form: W_UK moves to the query and W_UV to the output, so that a cached token is one latent and one
            rotated key for all heads; both scale by (nope + rope)^-0.5, because absorption changes where a product is
            taken, not the score. Products of one input are one product, and where it is cheaper than setting another
            one up, W_UK is multiplied into the query's projection and W_UV into the output's, once.
    MoE     where experts are small, all of them on every token, gates of 0 included: two products instead of two per
            expert that was chosen.

Roundings stand where the modules have them, but for the sum over small experts, which is rounded once, and for
multiplied-out weights, which are rounded instead of what passed between them. The plan is made
from the parameters when the first step needs it, and again after any of them changed: see `DecodePlan.fits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from examples.model.block import Block
from examples.model.calls import Calls, calls_for
from examples.model.layers import Experts, Linear, RMSNorm
from examples.model.mla import MLA, Layout
from examples.model.moe import MoE
from examples.model.mtp import MTPModule

if TYPE_CHECKING:
    from examples.model.transformer import Transformer

# A bf16 product on a CPU costs 12 us before it multiplies (oneDNN sets a primitive up), an fp32 one with its two casts
# 4 us, and then about 200 against 40 multiply-adds per ns (one Zen 5 core): fp32 is faster up to here.
SMALL_PRODUCT = 300_000
# Multiply-adds that one bf16 product could do in the time it is set up: the price of leaving work out.
SETUP = 1_500_000
CACHED_ELEMENTS = 1 << 18  # values between two products that stay in a core's second-level cache

Call = Callable[[torch.Tensor], torch.Tensor]


class Product:
    """x W for a weight [K, N], or a batch of them [B, K, N]; x [T, K] or [B, T, K], in the weight's type.

    Small bf16 products are taken in fp32 from a copy of the weight: the same exact products of bf16 values, the same
    fp32 sums in another order, the same single rounding.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.size = weight, weight.numel()
        self.multiply = torch.mm if weight.ndim == 2 else torch.bmm
        small = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and self.size <= SMALL_PRODUCT
        self.wide = weight.float().contiguous() if small else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, K] -> [..., T, N]."""
        if self.wide is not None and x.shape[-2] * self.size <= SMALL_PRODUCT:
            return self.multiply(x.float(), self.wide).to(x.dtype)
        return self.multiply(x, self.weight)


def product(*modules: nn.Module) -> Call:
    """The outputs of linear modules on one input, side by side; one product if they are not FP8."""
    if all(isinstance(module, Linear) for module in modules):
        weights = [module.weight.detach() for module in modules]
        return Product((weights[0] if len(weights) == 1 else torch.cat(weights)).mT)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def pays(size: int, *weights: torch.Tensor) -> bool:
    """Whether a product with one matrix of `size` elements costs less than the products with each of `weights`."""
    return size - sum(weight.numel() for weight in weights) < SETUP


class Norm:
    """`RMSNorm`, alone or after the residual addition."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def __call__(self, x: torch.Tensor, ops: Calls) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(
        self, delta: torch.Tensor | None, residual: torch.Tensor, ops: Calls
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(delta + residual), delta + residual); delta None stands for 0."""
        if delta is None:
            return ops.rms_norm(residual, self.weight, self.eps), residual
        return ops.rms_norm_residual(delta, residual, self.weight, self.eps)


class AbsorbedMLA:
    """`MLA` over cached latents, for 1 to 8 new tokens per sequence; writes theirs first. Prompts are read by `MLA`."""

    def __init__(self, attn: MLA) -> None:
        self.expanded = attn
        self.heads, self.scale, self.rank = attn.heads, attn.scale, attn.kv_rank
        self.head_parts = [attn.nope, attn.rope_dim]
        q_width = attn.q_rank or attn.heads * (attn.nope + attn.rope_dim)
        self.parts = [q_width, attn.kv_rank, attn.rope_dim]
        self.down = product(attn.qkv_a) if attn.q_rank else product(attn.q, attn.kv_a)
        self.q_norm = Norm(attn.q_norm) if attn.q_rank else None
        self.q_up = product(attn.q_b) if attn.q_rank else None
        self.kv_norm = Norm(attn.kv_norm)
        w_uk, w_uv = attn.absorbed_weights(self.kv_norm.weight.dtype)
        self.w_uk: Product | None = Product(w_uk.detach())
        self.w_uv: Product | None = Product(w_uv.detach().mT)
        self.o = product(attn.o)
        if isinstance(attn.o, Linear) and pays(
            attn.heads * attn.kv_rank * attn.o.weight.shape[0], attn.o.weight, w_uv
        ):
            # o(concat_h(w_uv_h latent_h)): [D, H v] times the block diagonal of w_uv.
            o = attn.o.weight.detach().float().view(-1, attn.heads, attn.v_dim).transpose(0, 1)
            merged = torch.bmm(o, w_uv.detach().float())  # [H, D, rank]
            self.o = Product(merged.transpose(0, 1).flatten(1).to(w_uv.dtype).mT)
            self.w_uv = None
        if attn.q_rank and isinstance(attn.q_b, Linear):
            width = attn.heads * (attn.kv_rank + attn.rope_dim)
            if pays(width * attn.q_rank, attn.q_b.weight, w_uk):
                q = attn.q_b.weight.detach().float().view(attn.heads, -1, attn.q_rank)
                latent = torch.bmm(w_uk.detach().float().mT, q[:, : attn.nope])  # [H, rank, q_rank]
                merged = torch.cat((latent, q[:, attn.nope :]), dim=1).flatten(0, 1)
                self.q_up = Product(merged.to(w_uk.dtype).mT)
                self.w_uk = None
                self.head_parts = [attn.kv_rank, attn.rope_dim]

    def __call__(self, x_TD: torch.Tensor, layout: Layout, pages: torch.Tensor, ops: Calls) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        if layout.lengths is None:
            return self.expanded(x_TD, layout, pages)
        c_q, c_kv, k_pe = torch.split_with_sizes(self.down(x_TD), self.parts, dim=-1)
        q = c_q if self.q_up is None else self.q_up(self.q_norm(c_q, ops))
        q_nope, q_pe = torch.split_with_sizes(
            q.view(-1, self.heads, sum(self.head_parts)), self.head_parts, dim=-1
        )
        turned = ops.rope(torch.cat((q_pe, k_pe[:, None]), dim=1), layout.positions, layout.inv_freq)
        ops.cache_write_(pages, self.kv_norm(c_kv, ops), turned[:, -1], layout.slots)
        if self.w_uk is not None:
            q_nope = self.w_uk(q_nope.transpose(0, 1)).transpose(0, 1)
        out, _ = ops.mla_decode(
            torch.cat((q_nope, turned[:, :-1]), dim=-1),
            pages,
            layout.block_table,
            layout.lengths,
            layout.cu_seqlens,
            softmax_scale=self.scale,
            latent_dim=self.rank,
            batch_invariant=layout.batch_invariant,
        )
        if self.w_uv is not None:
            out = self.w_uv(out.transpose(0, 1)).transpose(0, 1)
        return self.o(out.flatten(1))


class Dense:
    """`make_ffn`: the dense FFN."""

    def __init__(self, ffn: nn.Module) -> None:
        self.gate_up, self.down = product(ffn.gate_up), product(ffn.down)

    def __call__(self, x_TD: torch.Tensor, prompt: bool, ops: Calls) -> torch.Tensor:
        """[T, D] -> [T, D]; prompts and steps are one."""
        return self.down(ops.swiglu(self.gate_up(x_TD)))


class Mixture:
    """`MoE`. In a step every small expert computes every token, the shared ones as experts whose gate is 1.

    The cost rule: computing the E - k experts that a token did not choose must be cheaper than setting up the products
    of those that it chose. Experts of the report's size never pass it; then, in FP8, and for prompts, rows are sorted by
    expert as in training. The two ways round differently (once, or once per expert), so that the choice depends on the
    weights and on the kind of pass, never on the number of rows: a verifying pass must agree with the steps it replaces.
    An expert whose weights are not finite reaches every token of the step, not only its own.
    """

    def __init__(self, moe: MoE) -> None:
        self.moe, self.router = moe, moe.router
        self.gate = moe.router.weight.detach().float().mT
        self.small = False
        if not isinstance(moe.experts, Experts):  # FP8
            return
        gate_up, shared = moe.experts.gate_up.detach(), moe.shared
        experts, twice_inner, width = gate_up.shape
        unchosen = (experts - moe.top_k) * twice_inner * width * 3 // 2
        if unchosen > 2 * moe.top_k * SETUP:  # too much even for one token
            return
        self.small = True
        self.chunk = max(CACHED_ELEMENTS // (experts * twice_inner), 1)
        down = moe.experts.down.detach().mT.flatten(0, 1)
        always = torch.zeros(experts, device=gate_up.device)
        gate_up = gate_up.flatten(0, 1)
        if shared is not None:
            # A wide SwiGLU is several of the experts' width, side by side.
            halves = shared.gate_up.weight.detach().view(2, -1, twice_inner // 2, width)
            gate_up = torch.cat((gate_up, halves.transpose(0, 1).reshape(-1, width)))
            down = torch.cat((down, shared.down.weight.detach().mT))
            always = F.pad(always, (0, halves.shape[1]), value=1.0)
        self.always, self.gate_up, self.down = always, Product(gate_up.mT), Product(down)
        self.gated = (always.shape[0], twice_inner)

    def __call__(self, x_TD: torch.Tensor, prompt: bool, ops: Calls) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        rows = x_TD.shape[0]
        topk_weight, routing = self.router.choose(torch.mm(x_TD.float(), self.gate), ops.route)
        if prompt or not self.small:
            return self.moe.combine(x_TD, topk_weight, routing.topk_idx)
        gates = self.always.expand(rows, -1).scatter(1, routing.topk_idx, topk_weight)
        if rows <= self.chunk:
            return self._all_experts(x_TD, gates, ops)
        parts = zip(x_TD.split(self.chunk), gates.split(self.chunk), strict=True)
        return torch.cat([self._all_experts(x, weights, ops) for x, weights in parts])

    def _all_experts(self, x_TD: torch.Tensor, gates: torch.Tensor, ops: Calls) -> torch.Tensor:
        """Sum over experts of gates fp32 [T, E + shared] times their outputs: [T, D] -> [T, D]."""
        inner = ops.swiglu(self.gate_up(x_TD).view(-1, *self.gated), gates)
        return self.down(inner.flatten(1))


class Layer:
    """`Block`: pre-norm attention, pre-norm FFN."""

    def __init__(self, block: Block) -> None:
        self.attn_norm, self.attn = Norm(block.attn_norm), AbsorbedMLA(block.attn)
        self.ffn_norm = Norm(block.ffn_norm)
        self.ffn: Mixture | Dense = Mixture(block.ffn) if isinstance(block.ffn, MoE) else Dense(block.ffn)

    def __call__(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        layout: Layout,
        pages: torch.Tensor,
        ops: Calls,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(delta, residual) [T, D] each -> the same for the next layer."""
        x, residual = self.attn_norm.add(delta, residual, ops)
        x, residual = self.ffn_norm.add(self.attn(x, layout, pages, ops), residual, ops)
        return self.ffn(x, layout.lengths is None, ops), residual


class Draft:
    """`MTPModule`: one depth."""

    def __init__(self, mtp: MTPModule) -> None:
        self.emb_norm, self.hidden_norm, self.proj = (
            Norm(mtp.emb_norm),
            Norm(mtp.hidden_norm),
            product(mtp.proj),
        )
        self.layer, self.norm = Layer(mtp.block), Norm(mtp.norm)

    def __call__(
        self, hidden_TD: torch.Tensor, emb_TD: torch.Tensor, layout: Layout, pages: torch.Tensor, ops: Calls
    ) -> torch.Tensor:
        """(state of the depth before, embedding of the token k ahead) [T, D] -> state of this depth [T, D]."""
        x = self.proj(torch.cat((self.emb_norm(emb_TD, ops), self.hidden_norm(hidden_TD, ops)), dim=-1))
        return self.norm.add(*self.layer(None, x, layout, pages, ops), ops)[0]


class DecodePlan:
    """The whole model's step; `embed` and `head` are shared with the drafts."""

    def __init__(self, model: Transformer) -> None:
        self.embedding = model.embed.weight.detach()
        self.layers = [Layer(block) for block in model.layers]
        self.norm, self.to_logits = Norm(model.norm), product(model.head)
        self.drafts = [Draft(module) for module in model.mtp]
        self.sources = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        # Tensors of inference mode have no version counter: their plan serves one pass.
        self.tracked = not any(parameter.is_inference() for _, _, parameter in self.sources)
        self.state = self._state() if self.tracked else []

    def _state(self) -> list[tuple[int, int]]:
        return [(parameter._version, parameter.data_ptr()) for _, _, parameter in self.sources]

    def fits(self) -> bool:
        """Whether the parameters are those the plan was made from, unchanged.

        An update in place bumps a parameter's version counter (the optimizer's and `load_state_dict` do), a cast or a
        move changes its memory, a replacement is another object. Writing through `parameter.data` is none of these.
        """
        return (
            self.tracked
            and all(owner.get(name) is parameter for owner, name, parameter in self.sources)
            and self.state == self._state()
        )

    def trunk(self, tokens_T: torch.Tensor, layout: Layout, pages: Sequence[torch.Tensor]) -> torch.Tensor:
        """States after the final norm [T, D] of new tokens int64 [T], whose latents are written to the cache.

        They see each other (prompts), and with `layout.lengths` what the cache holds.
        """
        ops = calls_for(tokens_T, self.embedding, pages[0])
        delta, residual = None, self.embedding.index_select(0, tokens_T)
        for layer, layer_pages in zip(self.layers, pages, strict=False):  # the drafts' pages follow
            delta, residual = layer(delta, residual, layout, layer_pages, ops)
        return self.norm.add(delta, residual, ops)[0]

    def draft(
        self, depth: int, hidden_TD: torch.Tensor, tokens_T: torch.Tensor, layout: Layout, pages: torch.Tensor
    ) -> torch.Tensor:
        """State of MTP depth k [T, D] from that of depth k - 1 and the tokens k ahead, int64 [T]."""
        ops = calls_for(hidden_TD, tokens_T, self.embedding, pages)
        return self.drafts[depth - 1](hidden_TD, self.embedding.index_select(0, tokens_T), layout, pages, ops)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> fp32 [T, V]."""
        return self.to_logits(hidden_TD).float()
