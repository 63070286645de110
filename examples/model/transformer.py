"""DeepSeek-V3 (report section 2): embedding, blocks, final norm, output head, and the MTP modules behind them.

Tokens are flattened once: everything between embedding and head works on [T, D], and `Layout` says which tokens see
each other. Losses are sums over tokens divided by one count, so that micro-batches of any shape add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deepseek_ops._checks import ArgumentError, check_tensor
from deepseek_ops.loss import linear_cross_entropy
from deepseek_ops.moe import balance_loss
from deepseek_ops.rope import yarn_inv_freq
from examples.model.block import Block
from examples.model.config import ModelConfig
from examples.model.decoding import CachedDecoding
from examples.model.layers import RMSNorm, activation_dtype, make_linear
from examples.model.mla import Layout, row_borders
from examples.model.moe import Router, Routing
from examples.model.mtp import MTPModule
from examples.model.plan import DecodePlan

IGNORED = -100
FEW_TOKENS = 64  # up to here Python finds their range faster: decoding


@dataclass
class LossOutput:
    """What `Transformer.loss` returns; all losses are fp32 scalars in nats per token.

    loss: what to differentiate: main + mtp_weight * mean(mtp) + balance. main: next-token loss. mtp: one per depth, as the
    report divides them (by T, not by T - k). balance: summed over MoE layers, alpha included. counts: int64 [layers, E],
    tokens per expert of this pass, main layers then MTP. nll: fp32 [B, S] if asked for, 0 where masked.
    """

    loss: torch.Tensor
    main: torch.Tensor
    mtp: list[torch.Tensor]
    balance: torch.Tensor
    counts: torch.Tensor
    nll: torch.Tensor | None = None


class Transformer(CachedDecoding, nn.Module):
    """Parameters: `embed.weight` [V, D], `layers`, `norm`, `head.weight` [V, D], `mtp` (one module per depth).

    Initialised N(0, init_std), norms 1 (section 4.2), from torch's global generator. Build under
    ``torch.device("meta")`` to get shapes without memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dtype = activation_dtype(config.precision)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_empty(config, dtype))
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.num_dense_layers) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.head = make_linear(config.hidden_size, config.vocab_size, "high", config.precision)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.mtp_depth))
        self._inv_freq: dict[torch.device, torch.Tensor] = {}
        self._plan: DecodePlan | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew; norms become 1, routing biases and counts 0.

        Draws are fp32 and rounded to bf16 unless the model is fp32, so that a seed means the same weights in bf16 and
        in FP8 (whose masters are fp32): only then does comparing the two measure precision and not luck.
        """
        for name, parameter in self.named_parameters():
            assert parameter.ndim > 1 or "norm" in name
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif not parameter.is_meta:
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                drawn.normal_(std=self.config.init_std)
                parameter.copy_(drawn if self.config.precision == "fp32" else drawn.bfloat16())
        for router in self.routers():
            router.bias.zero_()
            router.counts.zero_()

    # --- states and logits ---------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        record: list[Routing] | None = None,
    ) -> torch.Tensor:
        """States after the final norm: tokens int64 [B, S] -> [B, S, D].

        positions: int64 [B, S], default 0..S-1 in each row. cu_seqlens: int32 [n + 1], borders over the B * S tokens
        of sequences that do not see each other; default: the rows. `record` collects routing, layer by layer.
        """
        layout = self._layout(tokens, positions, cu_seqlens)
        hidden, _ = self._trunk(tokens.reshape(-1), layout, record)
        return hidden.view(*tokens.shape, -1)

    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits, whole: int64 [B, S] -> fp32 [B, S, V]."""
        return self.head(self(tokens, positions, cu_seqlens)).float()

    def mtp_logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Logits of each MTP depth k for token i + k + 1: int64 [B, S] -> fp32 [B, S - k, V] for k = 1..D."""
        layout = self._layout(tokens, positions, cu_seqlens)
        hidden, emb = self._trunk(tokens.reshape(-1), layout)
        states = self._mtp_states(hidden, emb, layout, *tokens.shape)
        return [
            self.head(state).float().view(tokens.shape[0], -1, self.config.vocab_size) for state in states
        ]

    # --- loss ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        mtp_weight: float = 0.3,
        balance_alpha: float = 1e-4,
        normalizer: float | torch.Tensor | None = None,
        per_token: bool = False,
    ) -> LossOutput:
        """Training loss of B rows of S tokens and the token after each.

        tokens: int64 [B, S + 1]; tokens[:, :-1] are fed, tokens[:, 1:] predicted.
        cu_seqlens, positions: over the fed tokens, as in `forward`; every row starts a sequence. With documents hidden
        from each other, MTP predicts only inside a document.
        loss_mask: bool [B, S], which labels count; default all.
        mtp_weight: lambda of eq. 25; 0 leaves the MTP modules out. balance_alpha: of eq. 17; 0 leaves it out.
        normalizer: what the sums are divided by, default the number of labels that count. Micro-batches given the
        number of the whole batch add up to its loss and gradient (the balance loss is weighted by their share).
        per_token: also return the main loss of each token.
        """
        check_tensor("tokens", tokens, dtype=torch.int64, ndim=2)
        if tokens.shape[1] < 2:
            raise ArgumentError(
                f"tokens: must be [B, S + 1] with S at least 1; got shape {tuple(tokens.shape)}"
            )
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        rows, length = inputs.shape
        if loss_mask is not None:
            check_tensor("loss_mask", loss_mask, dtype=torch.bool, shape=(rows, length), device=tokens.device)
            labels = labels.masked_fill(~loss_mask, IGNORED)
        count = rows * length if loss_mask is None else loss_mask.sum().clamp(min=1)
        divisor = count if normalizer is None else normalizer

        layout = self._layout(inputs, positions, cu_seqlens)
        record: list[Routing] = []
        hidden, emb = self._trunk(inputs.reshape(-1), layout, record)
        nll = self._cross_entropy(hidden, labels, "none" if per_token else "sum")
        main = nll.sum() / divisor
        mtp = []
        if mtp_weight and self.config.mtp_depth:
            segment = _segments(cu_seqlens, rows, length)
            states = self._mtp_states(
                hidden, emb, layout, rows, length, record, documents=cu_seqlens is not None
            )
            for k, state in enumerate(states, 1):
                ahead = labels[:, k:]
                if segment is not None:
                    ahead = ahead.masked_fill(segment[:, k:] != segment[:, :-k], IGNORED)
                mtp.append(self._cross_entropy(state, ahead, "sum") / divisor)
        balance = main.new_zeros(())
        if balance_alpha and record:
            options = {"alpha": balance_alpha, "selection": self.config.balance_selection}
            for routing in record:
                borders = row_borders(rows, routing.scores.shape[0] // max(rows, 1), tokens.device)
                balance = balance + balance_loss(routing.scores, routing.topk_idx, borders, **options)
            if normalizer is not None:
                balance = balance * (count / normalizer)
        loss = main + balance
        if mtp:
            loss = loss + mtp_weight / len(mtp) * torch.stack(mtp).sum()
        counts = [routing.counts for routing in record]
        return LossOutput(
            loss=loss,
            main=main.detach(),
            mtp=[value.detach() for value in mtp],
            balance=balance.detach(),
            counts=torch.stack(counts) if counts else tokens.new_zeros(0, self.config.num_experts),
            nll=nll.detach().view(rows, length) if per_token else None,
        )

    def _cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
        return linear_cross_entropy(hidden, self.head.weight, labels.reshape(-1), reduction=reduction)

    # --- the routing bias ----------------------------------------------------------------------------------------

    def routers(self) -> list[Router]:
        """The gates in the order of `LossOutput.counts`: main layers, then MTP depths."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def expert_counts(self) -> torch.Tensor:
        """Tokens per expert since the last `update_bias`: int64 [layers, E], a copy."""
        counts = [router.counts for router in self.routers()]
        return torch.stack(counts) if counts else torch.zeros(0, self.config.num_experts, dtype=torch.int64)

    def update_bias(self, speed: float) -> None:
        """After an optimizer step: move every routing bias by the sign rule, and start counting again. In a parallel
        run, sum the `counts` buffers over the data-parallel ranks first."""
        for router in self.routers():
            router.update_bias(speed)

    def num_parameters(self, *, mtp: bool = False) -> int:
        """Parameters of the main model, or those that only the MTP modules have."""
        return sum(p.numel() for name, p in self.named_parameters() if name.startswith("mtp.") == mtp)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _trunk(
        self,
        tokens_T: torch.Tensor,
        layout: Layout,
        record: list[Routing] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Main model on flat tokens: (states after the final norm, embeddings), both [T, D]."""
        emb = self.embed(tokens_T)
        delta, residual = None, emb
        for block in self.layers:
            delta, residual = block(delta, residual, layout, record)
        return self.norm.add(delta, residual)[0], emb

    def _mtp_states(
        self,
        hidden_TD: torch.Tensor,
        emb_TD: torch.Tensor,
        layout: Layout,
        rows: int,
        length: int,
        record: list[Routing] | None = None,
        *,
        documents: bool = True,
    ) -> list[torch.Tensor]:
        """States of each depth k, [rows * (length - k), D]: positions whose k-th next token was fed."""
        width = hidden_TD.shape[-1]
        hidden, emb = hidden_TD.view(rows, length, width), emb_TD.view(rows, length, width)
        positions = layout.positions.view(rows, length)
        states = []
        for k, module in enumerate(self.mtp, 1):
            kept = max(length - k, 0)
            borders = (
                _shorten(layout.cu_seqlens, length, kept)
                if documents
                else row_borders(rows, kept, emb.device)
            )
            shorter = Layout(positions[:, :kept].reshape(-1), borders, layout.inv_freq)
            state = module(
                hidden[:, :kept].reshape(-1, width),
                emb[:, length - kept :].reshape(-1, width),
                shorter,
                record,
            )
            states.append(state)
            hidden = state.view(rows, kept, width)
        return states

    def _layout(
        self, tokens: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> Layout:
        self._check_tokens(tokens)
        rows, length = tokens.shape
        device = tokens.device
        if length > self.config.max_positions:
            raise ArgumentError(
                f"tokens: rows must be at most max_positions = {self.config.max_positions} long; got {length}"
            )
        if positions is None:
            positions = torch.arange(length, device=device).repeat(rows)
        else:
            check_tensor("positions", positions, dtype=torch.int64, shape=(rows, length), device=device)
        if cu_seqlens is None:
            cu_seqlens = row_borders(rows, length, device)
        else:
            check_tensor("cu_seqlens", cu_seqlens, dtype=torch.int32, ndim=1, device=device)
        return Layout(positions.reshape(-1), cu_seqlens, self._frequencies(device))

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        check_tensor("tokens", tokens, dtype=torch.int64, ndim=2, device=self.embed.weight.device)
        if tokens.device.type == "cpu" and tokens.numel():  # elsewhere the check would wait for the device
            few = tokens.numel() <= FEW_TOKENS
            values = tokens.flatten().tolist() if few else [int(value) for value in torch.aminmax(tokens)]
            low, high = min(values), max(values)
            if low < 0 or high >= self.config.vocab_size:
                raise ArgumentError(
                    f"tokens: must be in [0, {self.config.vocab_size}); got {low if low < 0 else high}"
                )

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        """RoPE's inverse frequencies, fp32 [rope / 2]: not a buffer, so that no cast of the model rounds them."""
        if device not in self._inv_freq:
            # A first call may be generation's; a table of inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                self._inv_freq[device] = self._frequency_table().to(device)
        return self._inv_freq[device]

    def _frequency_table(self) -> torch.Tensor:
        c = self.config
        dim, yarn = c.qk_rope_head_dim, c.yarn
        if yarn is None:
            return 1.0 / c.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        with torch.device("cpu"):
            return yarn_inv_freq(
                dim, c.rope_theta, yarn.factor, yarn.original_max, yarn.beta_fast, yarn.beta_slow
            )


def _empty(config: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)


def _shorten(cu_seqlens: torch.Tensor, length: int, kept: int) -> torch.Tensor:
    """Borders after each row of `length` tokens has lost its tail past `kept`."""
    row = cu_seqlens.div(length, rounding_mode="floor")
    return (row * kept + (cu_seqlens - row * length).clamp(max=kept)).to(torch.int32)


def _segments(cu_seqlens: torch.Tensor | None, rows: int, length: int) -> torch.Tensor | None:
    """Number of the sequence of each token, int64 [B, S]; None when rows are the sequences."""
    if cu_seqlens is None:
        return None
    token = torch.arange(rows * length, device=cu_seqlens.device)
    return torch.bucketize(token, cu_seqlens[1:].long(), right=True).view(rows, length)
