"""One request to the engine: what was asked, how far it has come, and what its reader has not read yet."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from examples.errors import UserError
from examples.model.cache import PAGE
from examples.rollout.pages import chain_key
from examples.rollout.sampling import Sampling
from examples.rollout.text import TextStream

# Why an answer ended: a stop token or string; max_tokens; the reader; the clock; a fault (its message in `Request.error`).
FINISH_REASONS = ("stop", "length", "cancelled", "deadline", "error")


class QueueFull(UserError):
    """The engine has as many waiting requests as it may; ask again later."""


@dataclass
class Chunk:
    """What one pass added to an answer; the last one has `finish`, one of `FINISH_REASONS`.

    text is empty while a character is incomplete or a stop string may be under way.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


class Request:
    """Made by `Engine.submit`. The engine's thread alone changes it, but for `cancelled`, `chunks` and `listener`.

    tokens: the prompt and the answer so far. logprobs: of the answer's tokens, under the model itself (temperature 1, no
    nucleus). computed: positions whose latents are in `pages`. draft: MTP's guess of the token after the last.
    drafts: position -> the draft that was read behind it, for an exact replay after a preemption.
    """

    def __init__(
        self, number: int, prompt: Sequence[int], sampling: Sampling, text: TextStream | None
    ) -> None:
        self.number, self.sampling, self.stream = number, sampling, text
        self.prompt_length = len(prompt)
        self.tokens, self.logprobs = list(prompt), list[float]()
        self.submitted = time.monotonic()
        self.expires = None if sampling.deadline is None else self.submitted + sampling.deadline
        self.first_token: float | None = None
        self.finish: str | None = None
        self.error = ""
        self.cancelled = False
        # What the engine knows of its pages:
        self.computed = self.published = self.shared_tokens = self.preemptions = 0
        self.pages: list[int] = []
        self.keys: list[bytes] = []
        self.draft: int | None = None
        self.drafts: dict[int, int] = {}
        # What its reader has not read yet. `ready` is set with every chunk; `listener` is told in the engine's thread.
        self.chunks: deque[Chunk] = deque()
        self.ready = threading.Event()
        self.listener: Callable[[], None] | None = None

    @property
    def answer(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def answered(self) -> int:
        """Number of new tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """New tokens that may still come."""
        return self.sampling.max_tokens - self.answered

    @property
    def pending(self) -> int:
        """Known tokens whose latents are missing; 1 when only the newest is."""
        return len(self.tokens) - self.computed

    def page_keys(self, count: int, ahead: int) -> list[bytes]:
        """Keys of its first `count` pages. ahead: tokens past a page that its content depends on."""
        for page in range(len(self.keys), count):
            parent = self.keys[-1] if self.keys else b"%d" % ahead
            self.keys.append(chain_key(parent, self.tokens[page * PAGE : (page + 1) * PAGE + ahead]))
        return self.keys[:count]

    def add(self, token: int, logprob: float, chunk: Chunk) -> None:
        """Take a new token into the answer and `chunk`; sets `finish` if it is the last."""
        self.first_token = self.first_token or time.monotonic()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        chunk.tokens.append(token)
        chunk.logprobs.append(logprob)
        found = False
        if self.stream is not None:
            text, found = self.stream.push(token)
            chunk.text += text
        if found or token in self.sampling.stop_tokens:
            self.finish = "stop"
        elif self.remaining == 0:
            self.finish = "length"
        if self.finish and not found and self.stream is not None:
            text, found = self.stream.flush()
            chunk.text += text
            self.finish = "stop" if found else self.finish

    def deliver(self, chunk: Chunk) -> None:
        """Hand a chunk to the reader."""
        chunk.finish = self.finish
        self.chunks.append(chunk)
        self.ready.set()
        if self.listener is not None:
            self.listener()

    def take(self) -> Chunk | None:
        """All that has come since the last call as one chunk, or None: a slow reader gets more at once, later.

        So what is kept for a reader is bounded by `max_tokens`, and never holds up the engine.
        """
        self.ready.clear()
        chunk = None
        while self.chunks:
            new = self.chunks.popleft()
            if chunk is None:
                chunk = new
            else:
                chunk.text += new.text
                chunk.tokens += new.tokens
                chunk.logprobs += new.logprobs
                chunk.finish = new.finish
        return chunk


@dataclass
class Work:
    """A request's part of a pass: `fed` from its position `computed` on, the last of them a draft if `draft`."""

    request: Request
    fed: list[int]
    draft: bool

    @property
    def sure(self) -> int:
        """Tokens that are the request's own."""
        return len(self.fed) - self.draft

    @property
    def end(self) -> int:
        """The request's length once the sure tokens are read."""
        return self.request.computed + self.sure
