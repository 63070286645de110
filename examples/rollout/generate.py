"""Generation on the latent KV cache, one token at a time: greedy or sampled, a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.sampling import outside_nucleus


@dataclass
class Generation:
    """What a batch of prompts became.

    tokens: per prompt, the new tokens, up to and including `eos`. steps: forward passes of the main model after the
    prompts. drafts, accepted: tokens that MTP proposed and that the model confirmed (speculative decoding only).
    """

    tokens: list[list[int]]
    steps: int = 0
    drafts: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of accepted drafts, 0 without drafts."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def count(self) -> int:
        """New tokens in all."""
        return sum(map(len, self.tokens))


@dataclass
class Collector:
    """New tokens per row, each row until `eos` or `limit`."""

    rows: int
    limit: int
    eos: int | None
    tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.rows)]

    def finished(self, row: int) -> bool:
        """Whether this row takes no more tokens."""
        new = self.tokens[row]
        return len(new) >= self.limit or (bool(new) and new[-1] == self.eos)

    def add(self, row: int, token: int) -> bool:
        """Append unless the row is finished; returns whether it was taken."""
        if self.finished(row):
            return False
        self.tokens[row].append(token)
        return True

    @property
    def all_finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(map(self.finished, range(self.rows)))


def pad_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded int64 [B, longest] and lengths [B]; checks that prompts are not empty and leave room for `new`."""
    if not prompts:
        raise UserError("prompts: must hold at least one; got none")
    if new < 1:
        raise UserError(f"max_new_tokens: must be at least 1; got {new}")
    limit = model.config.max_positions - new
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= limit:
            raise UserError(
                f"prompt {number}: must have 1 to {limit} tokens (model.max_positions={model.config.max_positions} "
                f"minus {new} new ones); got {len(prompt)}"
            )
    device = model.embed.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(list(prompt), device=device)
    return padded, lengths


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """One token per row from fp32 logits [B, V]: the largest if temperature is 0, else nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, index = probability.sort(-1, descending=True)
        ordered = ordered.masked_fill(outside_nucleus(ordered, top_p), 0.0)
        choice = torch.multinomial(ordered, 1, generator=generator)
        return index.gather(-1, choice).squeeze(-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_invariant: bool = False,
) -> Generation:
    """Continue token-id prompts. temperature 0 is greedy; sampling is deterministic given `seed`.

    batch_invariant: attention takes one product per sequence, so that its rounding does not depend on the batch.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature, top_p: must be >= 0 and in (0, 1]; got {temperature}, {top_p}")
    tokens, lengths = pad_prompts(model, prompts, max_new_tokens)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    cache = model.new_cache(
        len(prompts), tokens.shape[1] + max_new_tokens, batch_invariant=batch_invariant, drafts=False
    )
    output = model.prefill(tokens, cache, lengths)
    collector, result = Collector(len(prompts), max_new_tokens, eos), Generation([])
    while True:
        chosen = sample(output.logits[:, -1], temperature, top_p, generator)
        for row, token in enumerate(chosen.tolist()):
            collector.add(row, token)
        if collector.all_finished:
            break
        output = model.decode_step(chosen[:, None], cache)
        result.steps += 1
    result.tokens = collector.tokens
    return result
