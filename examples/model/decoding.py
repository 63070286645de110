"""Cached decoding of the Transformer: read the prompts, append tokens, draft with the MTP modules.

A step takes 1 to 8 tokens per sequence, so that one call samples, and one call verifies a draft (report section 5.4.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from deepseek_ops._checks import ArgumentError, check_range, check_tensor
from examples.model.cache import PAGE, LatentCache, Span
from examples.model.config import ModelConfig
from examples.model.mla import Layout, row_borders
from examples.model.plan import DecodePlan

MAX_STEP_TOKENS = 8


@dataclass
class StepOutput:
    """Of cached decoding. hidden: normed states [B, q, D]; logits: fp32 [B, q, V]; `prefill`: of each last token, q = 1.

    mtp_hidden: from `prefill` with MTP, each depth's last state [B, 1, D]: with more than one depth, the next depth's
    first draft continues from it (zeros for prompts too short to have one).
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    mtp_hidden: list[torch.Tensor] = field(default_factory=list)


class CachedDecoding:
    """The decoding methods of `Transformer`, which provides the parts they run."""

    if TYPE_CHECKING:
        config: ModelConfig
        embed: Any
        _plan: DecodePlan | None
        _check_tokens: Any
        _frequencies: Any

    def new_cache(
        self, batch_size: int, max_length: int, *, batch_invariant: bool = False, drafts: bool = True
    ) -> LatentCache:
        """An empty cache on the model's device; `batch_invariant` and `drafts` as in `LatentCache`."""
        return LatentCache(
            self.config,
            batch_size,
            max_length,
            batch_invariant=batch_invariant,
            drafts=drafts,
            device=self.embed.weight.device,
        )

    @torch.no_grad()
    def prefill(
        self, tokens: torch.Tensor, cache: LatentCache, lengths: torch.Tensor | None = None
    ) -> StepOutput:
        """Read prompts into an empty cache, the MTP modules' part included if it has one.

        tokens: int64 [B, S], padded on the right if `lengths` (int [B], at least 1 each) is given; padding is not
        computed. Returns the state and logits of each prompt's last token: [B, 1, D], [B, 1, V].
        """
        self._check_tokens(tokens)
        rows, longest = tokens.shape
        check_tensor("tokens", tokens, shape=(cache.batch_size, None))
        if not cache.empty:
            raise ArgumentError("cache: prefill needs an empty one; got sequences in it")
        if lengths is None:
            lengths = torch.full((rows,), longest, device=tokens.device)
        else:
            check_tensor("lengths", lengths, shape=(rows,), device=tokens.device)
            if rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
                raise ArgumentError(f"lengths: must be in [1, {longest}]; got {lengths.tolist()}")
        place = torch.arange(longest, device=tokens.device)
        cache.check_room(longest)
        all_slots = cache.slots(place.expand(rows, -1))
        plan, hidden, last = self._decode_plan(), None, []
        for depth in range(1 + cache.depths):
            # Depth k knows the positions whose k-th next token is in the prompt.
            kept = (lengths - depth).clamp(min=0)
            row, position = (place < kept[:, None]).nonzero(as_tuple=True)
            borders = F.pad(kept.cumsum(0), (1, 0)).to(torch.int32)
            layout = Layout(position, borders, self._frequencies(tokens.device), all_slots[row, position])
            cache.fill(depth, kept, max(longest - depth, 0))
            if depth == 0:
                flat = plan.trunk(tokens[row, position], layout, cache.pages)
            else:
                pages = cache.pages[self.config.num_layers + depth - 1]
                flat = plan.draft(depth, hidden[row, position], tokens[row, position + depth], layout, pages)
            hidden = _unpack(flat, row, position, rows, longest)
            last.append(hidden[torch.arange(rows, device=tokens.device), (kept - 1).clamp(min=0)][:, None])
        return StepOutput(last[0], plan.logits(last[0][:, 0])[:, None], last[1:])

    @torch.no_grad()
    def decode_step(self, tokens: torch.Tensor, cache: LatentCache) -> StepOutput:
        """Append 1 to 8 tokens per sequence (one sampled, or one and a draft to verify): int64 [B, q] -> [B, q, ...]."""
        layout = self._append(tokens, cache, 0)
        plan = self._decode_plan()
        return _step_output(plan, plan.trunk(tokens.flatten(), layout, cache.pages), tokens.shape)

    @torch.no_grad()
    def mtp_draft(
        self, hidden: torch.Tensor, next_token: torch.Tensor, cache: LatentCache, depth: int = 1
    ) -> StepOutput:
        """One step of MTP depth k: from the states of depth k - 1 at q positions and the tokens k ahead of them.

        hidden: [B, q, D], `StepOutput.hidden` of `prefill`, `decode_step` or of the depth before. next_token: int64
        [B, q]. The logits are those of the token after `next_token`. Appends to the depth's own part of the cache, which
        must hold exactly the positions before these (`cache.truncate(lengths, depth)` takes rejected ones back).
        """
        check_range("depth", depth, low=1, high=self.config.mtp_depth)
        if depth > cache.depths:
            raise ArgumentError("cache: mtp_draft needs one made with drafts=True; got one without")
        check_tensor("hidden", hidden, shape=(*next_token.shape, self.config.hidden_size))
        layout = self._append(next_token, cache, depth)
        pages = cache.pages[self.config.num_layers + depth - 1]
        plan = self._decode_plan()
        state = plan.draft(depth, hidden.flatten(0, 1), next_token.flatten(), layout, pages)
        return _step_output(plan, state, next_token.shape)

    @torch.no_grad()
    def ragged_step(
        self,
        spans: Sequence[Span],
        pages: Sequence[torch.Tensor],
        *,
        hidden: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        """Append each span's tokens, as many as it has, to its sequence: states after the last norm [T, D], span by span.

        Prompts, parts of prompts and steps of other sequences share a pass, in the absorbed form, so that a token's
        latent does not depend on where a prompt was cut. pages: of `new_pages`.
        hidden: [T, D] states of the main model; with it this is a pass of MTP depth 1, and tokens are those one ahead.
        `step_logits` makes logits of the rows that need them.
        """
        device = self.embed.weight.device
        tokens = torch.tensor([token for span in spans for token in span.tokens], device=device)
        self._check_tokens(tokens[None])
        layout = self._ragged_layout(spans, batch_invariant)
        if hidden is None:
            return self._decode_plan().trunk(tokens, layout, pages)
        return self._decode_plan().draft(1, hidden, tokens, layout, pages[self.config.num_layers])

    @torch.no_grad()
    def step_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States after the last norm [T, D] -> fp32 [T, V]."""
        return self._decode_plan().logits(hidden)

    def _ragged_layout(self, spans: Sequence[Span], batch_invariant: bool) -> Layout:
        """Attention reads at most 8 queries per sequence: a longer span is several, each one's keys end with its own
        last query, and all their latents are written before any is read."""
        parts = [
            (span, at, min(at + MAX_STEP_TOKENS, span.end))
            for span in spans
            for at in range(span.start, span.end, MAX_STEP_TOKENS)
        ]
        width = max(-(-end // PAGE) for _, _, end in parts)
        blocks = [list(span.blocks[:width]) for span, _, _ in parts]
        borders = list(itertools.accumulate((end - at for _, at, end in parts), initial=0))
        positions = [position for span in spans for position in range(span.start, span.end)]
        slots = [
            span.blocks[position // PAGE] * PAGE + position % PAGE
            for span in spans
            for position in range(span.start, span.end)
        ]
        device = self.embed.weight.device
        return Layout(
            torch.tensor(positions, device=device),
            torch.tensor(borders, dtype=torch.int32, device=device),
            self._frequencies(device),
            torch.tensor(slots, device=device),
            torch.tensor(
                [row + [0] * (width - len(row)) for row in blocks], dtype=torch.int32, device=device
            ),
            torch.tensor([end for _, _, end in parts], dtype=torch.int32, device=device),
            batch_invariant,
        )

    def _decode_plan(self) -> DecodePlan:
        """The plan of a step, made anew if parameters have changed since the last one."""
        if self._plan is None or not self._plan.fits():
            self._plan = DecodePlan(self)
        return self._plan

    def _append(self, tokens: torch.Tensor, cache: LatentCache, depth: int) -> Layout:
        self._check_tokens(tokens)
        check_tensor("tokens", tokens, shape=(cache.batch_size, None))
        check_range("tokens.shape[1]", tokens.shape[1], low=1, high=MAX_STEP_TOKENS)
        rows, count = tokens.shape
        positions, slots, lengths = cache.reserve(depth, count)
        borders = row_borders(rows, count, tokens.device)
        frequencies = self._frequencies(tokens.device)
        return Layout(
            positions, borders, frequencies, slots, cache.block_table, lengths, cache.batch_invariant
        )


def _step_output(plan: DecodePlan, hidden_TD: torch.Tensor, shape: torch.Size) -> StepOutput:
    return StepOutput(hidden_TD.view(*shape, hidden_TD.shape[-1]), plan.logits(hidden_TD).view(*shape, -1))


def _unpack(
    flat: torch.Tensor, row: torch.Tensor, position: torch.Tensor, rows: int, length: int
) -> torch.Tensor:
    """[T, D] back to rows: [B, S, D], 0 where a row has no token."""
    out = flat.new_zeros(rows, length, flat.shape[-1])
    out[row, position] = flat
    return out
