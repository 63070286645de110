"""The generation engine: requests join and leave between passes, over pages that equal prefixes share.

A pass takes each running request's next tokens at once: one of an answer (and a draft to verify), or a piece of a prompt.

    submit ─> waiting ─ pages for all its tokens ─> running ─ last token ─> finished
                 ^                                    │ pages run out: the youngest gives its own back
                 └──────────────── preempted ─────────┘ and computes its latents again later

What neighbours can do to a result. A request draws its own random numbers (`sampling.choose`), so only rounding is left:
on CPUs the last bits of a matrix product depend on its number of rows, and a bit can turn a near-tie. `invariance` says
how much of that is excluded:

    none        nothing: the fastest
    attention   attention takes a product per request (`deepseek_ops.attention.mla_decode`), as `generate` can
    full        every product: a request's passes are its own, cut where its own tokens say, so that each call sees the same
                operands whatever else runs. Prompts are cut at page borders, only such pages are shared, and a preempted
                request replays the passes it had. The bits of its logits are a function of the request alone; a batch
                then costs what its requests cost one by one.

Speculation (MTP) never changes what is chosen either, only how many passes it takes: a draft is accepted if it is the
token that the request's logits and random number choose at its place. For a draft that MTP is sure of that is the
published rule: it stays with its probability under the model.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from deepseek_ops._checks import ceil_div
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.cache import PAGE, Span, new_pages
from examples.model.transformer import Transformer
from examples.rollout.pages import PagePool
from examples.rollout.request import Chunk, QueueFull, Request, Work
from examples.rollout.sampling import Sampling, choose
from examples.rollout.text import TextStream


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. pages: of 64 tokens. pass_tokens: of one pass, so that a long prompt does not hold up others.
    max_waiting: a bounded queue; more is `QueueFull`. share_prefixes, speculative, invariance: see the module."""

    pages: int = 256
    max_running: int = 32
    max_waiting: int = 256
    pass_tokens: int = 512
    share_prefixes: bool = True
    speculative: bool = False
    invariance: Literal["none", "attention", "full"] = "attention"

    def __post_init__(self) -> None:
        for name, low in (("pages", 1), ("max_running", 1), ("max_waiting", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name}: must be at least {low}; got {getattr(self, name)}")
        least = 2 * self.max_running + PAGE
        if self.pass_tokens < least:
            rule = f"at least 2 * max_running + {PAGE} = {least}, or prompts could starve"
            raise UserError(f"pass_tokens: must be {rule}; got {self.pass_tokens}")
        if self.invariance not in ("none", "attention", "full"):
            raise UserError(f"invariance: must be none, attention or full; got {self.invariance!r}")


class Engine:
    """`submit` and `cancel` from any thread; `step`, or what calls it (`run`, `stream`, `Worker`), from one at a time.

    stats: counters since the start: passes, prompt_tokens, shared_tokens (found in pages), computed_tokens,
    generated_tokens, preemptions, drafts, accepted, and finished_REASON.
    """

    def __init__(
        self, model: Transformer, config: EngineConfig | None = None, *, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model, self.config, self.tokenizer = model, config or EngineConfig(), tokenizer
        if self.config.speculative and model.config.mtp_depth < 1:
            raise UserError("speculative: needs model.mtp_depth of at least 1; got 0")
        self.ahead = int(self.config.speculative)  # MTP's latent at a position depends on the token after it
        device = model.embed.weight.device
        self.latents = new_pages(model.config, self.config.pages, self.ahead, device=device)
        self.pool = PagePool(self.config.pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of submission
        self.stats: Counter[str] = Counter()
        self.wake = threading.Condition()  # guards `waiting` and the number; told of every submission
        self.closed = ""  # why nothing more is taken, once that is so
        self._number = 0

    # --- from any thread -----------------------------------------------------------------------------------------

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise `UserError` unless this request can be answered by this engine at all."""
        c = self.model.config
        room = min(c.max_positions, self.config.pages * PAGE)
        if not 1 <= len(prompt) <= room - sampling.max_tokens:
            rule = f"1 to {room - sampling.max_tokens} tokens ({room} positions minus max_tokens={sampling.max_tokens})"
            raise UserError(f"prompt: must have {rule}; got {len(prompt)}")
        if not 0 <= min(prompt) <= max(prompt) < c.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < c.vocab_size)
            raise UserError(f"prompt: tokens must be in [0, {c.vocab_size}); got {wrong}")
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop: strings need an engine with a tokenizer; got one without")

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Queue a request; `QueueFull` if the queue is, `UserError` if it could never be answered."""
        self.check(prompt, sampling)
        stream = TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None
        with self.wake:
            if self.closed:
                raise UserError(f"engine: takes no more requests; {self.closed}")
            if len(self.waiting) >= self.config.max_waiting:
                raise QueueFull(f"queue: holds at most {self.config.max_waiting} requests and is full")
            request = Request(self._number, prompt, sampling, stream)
            self._number += 1
            self.waiting.append(request)
            self.wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Give a request up: it leaves, and its pages are free, before the next pass."""
        request.cancelled = True
        with self.wake:
            self.wake.notify()

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The request's chunks as they come, driving the engine; leaving the loop early cancels the request."""
        try:
            while request.finish is None or request.chunks:
                if (chunk := request.take()) is not None:
                    yield chunk
                else:
                    self.step()
        finally:
            if request.finish is None:
                self.cancel(request)
                self.step()

    # --- the engine's thread -------------------------------------------------------------------------------------

    def run(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Request]:
        """Answer all prompts, each with its own sampling or all with one; the queue's bound is waited for."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        requests = []
        for prompt, wanted in zip(prompts, each, strict=True):
            while len(self.waiting) >= self.config.max_waiting:
                self.step()
            requests.append(self.submit(prompt, wanted))
        while self.step():
            pass
        return requests

    def step(self) -> bool:
        """Let requests leave and join, then one pass of those that run; False if none is left."""
        self._expire()
        self._admit()
        work = self._schedule()
        with torch.inference_mode():
            for group in [[part] for part in work] if self.config.invariance == "full" else [work]:
                if group:
                    self._pass(group)
        return bool(self.running or self.waiting)

    def fail(self, message: str) -> None:
        """End every request with an error: after a pass raised, or when the engine must stop."""
        with self.wake:
            everyone = [*self.running, *self.waiting]
        for request in everyone:
            request.error = message
            self._finish(request, "error")

    def _expire(self) -> None:
        """Cancelled and late requests leave."""
        now = time.monotonic()
        with self.wake:
            everyone = [*self.running, *self.waiting]
        for request in everyone:
            if request.cancelled:
                self._finish(request, "cancelled")
            elif request.expires is not None and now >= request.expires:
                self._finish(request, "deadline")

    def _admit(self) -> None:
        """The queue's first, as long as there are pages for all tokens that they have and one more.

        One whose next page a running request is about to compute is passed over until it can be shared: a group of
        answers to one prompt reads it once.
        """
        with self.wake:
            queue = list(self.waiting)
        coming = {key for r in self.running for key in r.keys[r.published : self._shareable(r)]}
        for request in queue:
            if len(self.running) >= self.config.max_running:
                return
            keys = request.page_keys(self._shareable(request), self.ahead)
            pages = self.pool.share(keys)
            missing = keys[len(pages) :]
            if missing and missing[0] in coming:
                self.pool.release(pages)
                continue
            if self.pool.available < ceil_div(len(request.tokens) + 1, PAGE) - len(pages):
                self.pool.release(pages)
                return
            coming.update(missing)
            with self.wake:
                self.waiting.remove(request)
            request.pages, request.published = pages, len(pages)
            request.computed = len(pages) * PAGE
            if request.preemptions == 0:
                request.shared_tokens = request.computed
                self.stats["prompt_tokens"] += request.prompt_length
                self.stats["shared_tokens"] += request.computed
            self.running.append(request)
            self.running.sort(key=lambda r: r.number)

    def _shareable(self, request: Request) -> int:
        """Leading full pages that others may have computed; the last token is always read, for its logits."""
        if not self.config.share_prefixes:
            return 0
        full = self.config.invariance == "full"  # then only what was read as a prompt has a prompt's bits
        return ((request.prompt_length if full else len(request.tokens)) - 1) // PAGE

    def _schedule(self) -> list[Work]:
        """What each running request reads now: answers first, then prompts in order, as far as the pass has room."""
        budget, work = self.config.pass_tokens, []
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            if request not in self.running:  # preempted for one before it
                continue
            part = self._next(request, budget)
            if part.fed and self._reserve(request, request.computed + len(part.fed)):
                budget -= 0 if self.config.invariance == "full" else len(part.fed)
                work.append(part)
        return [part for part in work if part.request in self.running]

    def _next(self, request: Request, budget: int) -> Work:
        at, count = request.computed, min(request.pending, budget)
        if self.config.invariance == "full":
            # Cut where the request alone decides: page borders of the prompt, then the passes that its answer took.
            border = min((at // PAGE + 1) * PAGE, request.prompt_length)
            count = border - at if at < request.prompt_length else 1
        fed = request.tokens[at : at + count]
        draft = request.drafts.get(at) if request.pending > 1 else request.draft
        if draft is None or at < request.prompt_length or count != 1:
            return Work(request, fed, False)
        if self.config.invariance == "full":
            request.drafts[at] = draft
        return Work(request, [*fed, draft], True)

    def _reserve(self, request: Request, length: int) -> bool:
        """Pages for `length` tokens; whoever came last gives theirs back, in the end the request itself: False."""
        need = ceil_div(length, PAGE) - len(request.pages)
        while self.pool.available < need:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        for _ in range(need):
            page = self.pool.allocate()
            assert page is not None
            request.pages.append(page)
        return True

    def _preempt(self, request: Request) -> None:
        self._give_back(request)
        request.preemptions += 1
        self.stats["preemptions"] += 1
        with self.wake:
            self.waiting.appendleft(request)

    def _give_back(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.pages)
        request.pages, request.computed, request.published, request.draft = [], 0, 0, None

    def _finish(self, request: Request, reason: str, chunk: Chunk | None = None) -> None:
        if request in self.running:
            self._give_back(request)
        else:
            with self.wake:
                self.waiting.remove(request)
        request.finish = reason
        self.stats[f"finished_{reason}"] += 1
        request.deliver(chunk or Chunk())

    def _pass(self, work: list[Work]) -> None:
        """Read, choose, draft, deliver."""
        self.stats["passes"] += 1
        self.stats["computed_tokens"] += sum(len(part.fed) for part in work)
        exact = self.config.invariance == "attention"  # a pass with one request in it is invariant as it is
        spans = [Span(part.fed, part.request.computed, part.request.pages) for part in work]
        hidden = self.model.ragged_step(spans, self.latents, batch_invariant=exact)
        choices = self._choose(work, hidden)
        chunks, confirmed = [Chunk() for _ in work], []
        for part, chunk, chosen in zip(work, chunks, choices, strict=True):
            confirmed.append(self._confirm(part, chunk, chosen))
        if self.ahead:
            self._draft(work, confirmed, hidden, batch_invariant=exact)
        for part, chunk, count in zip(work, chunks, confirmed, strict=True):
            request = part.request
            if request.finish is None or not self.ahead:
                request.computed += count
            self._publish(request)
            if request.finish is not None:
                self._finish(request, request.finish, chunk)
            elif chunk.tokens:
                request.deliver(chunk)

    def _choose(self, work: list[Work], hidden: torch.Tensor) -> list[list[tuple[int, float]]]:
        """(token, logprob) after the last sure token and after the draft, for each request whose next token is unknown."""
        rows, wanted, owners, row = [], [], [], 0
        for number, part in enumerate(work):
            request = part.request
            if part.end == len(request.tokens):
                for ahead in range(1 + part.draft):
                    rows.append(row + part.sure - 1 + ahead)
                    wanted.append((request.sampling, request.answered + ahead))
                    owners.append(number)
            row += len(part.fed)
        choices: list[list[tuple[int, float]]] = [[] for _ in work]
        if rows:
            logits = self.model.step_logits(hidden[torch.tensor(rows, device=hidden.device)])
            tokens = choose(logits, wanted)
            index = torch.tensor(tokens, device=logits.device)[:, None]
            logprobs = (logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)).tolist()
            for owner, token, logprob in zip(owners, tokens, logprobs, strict=True):
                choices[owner].append((token, logprob))
        return choices

    def _confirm(self, part: Work, chunk: Chunk, chosen: list[tuple[int, float]]) -> int:
        """Take what was chosen into the request; returns how many of the fed tokens are right."""
        request, draft = part.request, part.fed[-1]
        if not chosen:  # a prompt's beginning, or a replay: what follows is known
            known = part.draft and len(request.tokens) > part.end + 1 and draft == request.tokens[part.end]
            return part.sure + known
        right = part.draft and chosen[0][0] == draft
        self.stats["drafts"] += part.draft
        self.stats["accepted"] += right
        for token, logprob in chosen[: 1 + right]:
            if not math.isfinite(logprob):
                request.finish, request.error = "error", "the model's logits are not finite"
                return part.sure
            self.stats["generated_tokens"] += 1
            request.add(token, logprob, chunk)
            if request.finish is not None:
                return part.sure
        return part.sure + right

    def _draft(
        self, work: list[Work], confirmed: list[int], hidden: torch.Tensor, *, batch_invariant: bool
    ) -> None:
        """MTP reads every position whose next token is known now, and guesses the token after the newest."""
        spans, rows, asking, row = [], [], [], 0
        for part, count in zip(work, confirmed, strict=True):
            request, at = part.request, part.request.computed
            request.draft = None
            if request.finish is None:
                rows += range(row, row + count)
                spans.append(Span(request.tokens[at + 1 : at + 1 + count], at, request.pages))
                if at + count == len(request.tokens) - 1 and request.remaining >= 2:
                    asking.append((request, len(rows) - 1))
            row += len(part.fed)
        if not spans:
            return
        states = self.model.ragged_step(
            spans,
            self.latents,
            hidden=hidden[torch.tensor(rows, device=hidden.device)],
            batch_invariant=batch_invariant,
        )
        if asking:
            index = torch.tensor([last for _, last in asking], device=states.device)
            drafts = self.model.step_logits(states[index]).argmax(-1).tolist()
            for (request, _), draft in zip(asking, drafts, strict=True):
                request.draft = draft

    def _publish(self, request: Request) -> None:
        """Let others find the pages that are full now."""
        full = min(request.computed // PAGE, (len(request.tokens) - self.ahead) // PAGE)
        if self.config.invariance == "full":
            full = min(full, request.prompt_length // PAGE)
        if self.config.share_prefixes and full > request.published:
            keys = request.page_keys(full, self.ahead)
            for page in range(request.published, full):
                self.pool.publish(request.pages[page], keys[page])
            request.published = full
