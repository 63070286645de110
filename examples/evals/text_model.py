"""A model and its tokenizer as three questions about text, which every evaluation is made of.

    loglikelihood           how probable is this continuation of that context, and is it what greedy decoding would write?
    loglikelihood_rolling   how probable is a whole text of any length?
    generate_until          what follows, until one of these strings?

The names and the meaning are those of EleutherAI's lm-eval, so that its tasks run on the same code (`lm_eval_adapter`).
Every text begins with bos, as every document did in pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import generate

Scored = tuple[float, bool]  # log-probability in nats; whether every token of it is the most probable one


@torch.inference_mode()
def score_continuations(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> list[Scored]:
    """Log-probability of token-id continuations of token-id contexts (neither may be empty).

    The sequence may be longer than model.max_positions by as much as fits into the context: its beginning is left out.
    """
    limit = model.config.max_positions
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= limit:
            raise UserError(
                f"pair {number}: needs a context and a continuation of 1 to {limit} tokens (model.max_positions); "
                f"got {len(context)} and {len(continuation)}"
            )
    results: list[Scored] = [(0.0, True)] * len(pairs)
    order = sorted(
        range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1])
    )  # like lengths together
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    for at in range(0, len(order), batch_size):
        group = order[at : at + batch_size]
        rows = [[*pairs[i][0], *pairs[i][1]][-(limit + 1) :] for i in group]
        longest = max(map(len, rows)) - 1
        fed = torch.zeros(
            len(rows), longest, dtype=torch.int64, device=device
        )  # what lies behind a row is never seen
        places, labels = [], []
        for number, (i, row) in enumerate(zip(group, rows, strict=True)):
            fed[number, : len(row) - 1] = torch.tensor(row[:-1], device=device)
            count = len(pairs[i][1])
            places += [number * longest + len(row) - 1 - count + k for k in range(count)]
            labels += row[-count:]
        hidden = model(fed).reshape(len(rows) * longest, -1)[torch.tensor(places, device=device)]
        log_p = torch.log_softmax(model.head(hidden).float(), -1)  # only where it is asked for
        label = torch.tensor(labels, device=device)
        values = log_p.gather(-1, label[:, None]).squeeze(-1).double().tolist()
        greedy = (log_p.argmax(-1) == label).tolist()
        start = 0
        for i in group:
            end = start + len(pairs[i][1])
            results[i] = sum(values[start:end]), all(greedy[start:end])
            start = end
    model.train(was_training)
    return results


@torch.inference_mode()
def next_log_probabilities(model: Transformer, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of the token after each prompt: fp32 [prompts, V]."""
    longest = max(map(len, prompts))
    fed = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for number, prompt in enumerate(prompts):
        fed[number, : len(prompt)] = torch.tensor(list(prompt))
    hidden = model(fed.to(model.embed.weight.device))
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
    return torch.log_softmax(
        model.head(hidden[torch.arange(len(prompts), device=hidden.device), last]).float(), -1
    )


def rolling_windows(
    tokens: Sequence[int], prefix: int, limit: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Cut a text so that each token is predicted once, `limit` at a time, each first one from the token before it; the last
    window is filled up with context."""
    whole = [prefix, *tokens]
    windows = []
    for start in range(0, len(tokens), limit):
        end = min(start + limit, len(tokens))
        first = start if end - start == limit else max(0, end - limit)
        windows.append((whole[first : start + 1], whole[start + 1 : end + 1]))
    return windows


@dataclass
class TextModel:
    """batch_size: rows at once. max_new_tokens: of `generate_until` where its caller does not say."""

    model: Transformer
    tokenizer: Tokenizer
    batch_size: int = 16
    max_new_tokens: int = 64

    @property
    def limit(self) -> int:
        """Longest input."""
        return self.model.config.max_positions

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the context ends. Spaces at the end of a context belong to what follows, as the tokenizer
        joins them to the next word."""
        spaces = len(context) - len(context.rstrip(" "))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        head = self.tokenizer.encode(context)
        whole = self.tokenizer.encode(context + continuation)
        return [self.tokenizer.bos_id, *head], whole[len(head) :]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Log-probability of each continuation given its context, and whether it is the greedy one."""
        encoded = [self.encode_pair(*pair) for pair in pairs]
        return score_continuations(self.model, encoded, self.batch_size)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each whole text."""
        windows = [
            rolling_windows(self.tokenizer.encode(text), self.tokenizer.bos_id, self.limit) for text in texts
        ]
        scores = iter(
            score_continuations(
                self.model, [window for group in windows for window in group], self.batch_size
            )
        )
        return [sum(next(scores)[0] for _ in group) for group in windows]

    def generate_until(
        self,
        prompts: Sequence[str],
        until: Sequence[str] = (),
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """What follows each prompt, without eos and whatever comes after it, cut before the first of `until`. The beginning
        of a prompt that leaves no room is left out."""
        new = max_new_tokens or self.max_new_tokens
        if not 1 <= new < self.limit:
            raise UserError(f"max_new_tokens: must be 1 to {self.limit - 1}; got {new}")
        ids = [
            [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)][new - self.limit :] for prompt in prompts
        ]
        texts = [""] * len(prompts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for number, at in enumerate(range(0, len(order), self.batch_size)):
            group = order[at : at + self.batch_size]
            result = generate(
                self.model.eval(),
                [ids[i] for i in group],
                new,
                eos=self.tokenizer.eos_id,
                temperature=temperature,
                top_p=top_p,
                seed=seed + number,
            )
            for i, tokens in zip(group, result.tokens, strict=True):
                texts[i] = cut(self.tokenizer.decode(tokens, skip_special=True), until)
        return texts


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first occurrence of any of `until`."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
