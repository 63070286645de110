"""Speculative decoding with the MTP module (report sections 2.2 and 5.4.3), greedy and exact.

MTP predicts the token after the next one from the state it would be computed from, so each pass of the main model can
verify one draft: it reads [next, draft], and if its own choice after `next` is the draft, the pass yields two tokens.
The output equals plain greedy decoding; only the number of passes changes.

    caches hold            main: positions < n           MTP: positions < n - 1
    draft                  MTP reads (state n-1, next) -> draft for position n + 1
    verify                 main reads [next, draft] at n, n + 1 -> a (for n + 1), b (for n + 2)
    draft == a             next = b, state n + 1; MTP then reads both (state n, a), (state n + 1, b)
    draft != a             next = a, state n; both caches forget position n + 1

Rows end at different passes, as many as their drafts were right: those that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import Collector, Generation, pad_prompts

# Finished rows leave when no more than this share still runs: a batch of another size has set-up costs of its own.
LEAVE = 0.75


@torch.inference_mode()
def generate_speculative(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos: int | None = None,
    batch_invariant: bool = False,
) -> Generation:
    """Greedy continuation of token-id prompts with one MTP draft per pass, and how many drafts were right.

    In bf16 a near-tie of the logits can fall the other way than in `generate`, for products of other batches round
    differently; with `batch_invariant` in both calls attention, the largest source of that, rounds alike.
    """
    if model.config.mtp_depth < 1:
        raise UserError(
            f"model.mtp_depth: speculative decoding needs at least 1; got {model.config.mtp_depth}"
        )
    tokens, lengths = pad_prompts(model, prompts, max_new_tokens)
    rows = len(prompts)
    # A pass may write two positions past the last token that is kept.
    cache = model.new_cache(rows, tokens.shape[1] + max_new_tokens + 2, batch_invariant=batch_invariant)
    output = model.prefill(tokens, cache, lengths)
    collector, result = Collector(rows, max_new_tokens, eos), Generation([])
    following = output.logits[:, -1].argmax(-1)  # "next" above
    for row, token in enumerate(following.tolist()):
        collector.add(row, token)

    kept = lengths.clone()  # n: positions of the main model that hold confirmed tokens
    draft = model.mtp_draft(output.hidden, following[:, None], cache).logits[:, -1].argmax(-1)
    running = list(range(rows))
    while not collector.all_finished:  # a first token may have ended them all
        output = model.decode_step(torch.stack([following, draft], 1), cache)
        result.steps += 1
        choice = output.logits.argmax(-1)  # a, b
        right = choice[:, 0] == draft
        for row, a, b, accepted in zip(
            running, choice[:, 0].tolist(), choice[:, 1].tolist(), right.tolist(), strict=True
        ):
            if collector.finished(row):
                continue
            result.drafts += 1
            result.accepted += accepted
            collector.add(row, a)
            if accepted:
                collector.add(row, b)
        going = [place for place, row in enumerate(running) if not collector.finished(row)]
        if not going:
            break
        # A finished row stands still, so that it cannot outgrow the cache while others go on.
        still = torch.zeros_like(kept)
        still[going] = 1
        kept = kept + still * (1 + right.long())
        cache.truncate(kept, 0)
        hidden = output.hidden
        if len(going) <= LEAVE * len(running):
            running, stay = [running[place] for place in going], torch.tensor(going, device=kept.device)
            cache.keep(stay)
            kept, choice, right, hidden = kept[stay], choice[stay], right[stay], hidden[stay]
        following = torch.where(right, choice[:, 1], choice[:, 0])
        # MTP reads both positions of every row; a rejected row forgets the second.
        drafts = model.mtp_draft(hidden, choice, cache).logits.argmax(-1)
        cache.truncate(kept, 1)
        draft = drafts.gather(1, right.long()[:, None]).squeeze(1)
    result.tokens = collector.tokens
    return result
