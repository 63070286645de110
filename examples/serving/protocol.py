"""OpenAI's bodies to requests of the engine, and chunks of answers back.

A field means what OpenAI's reference says. What the engine cannot do is refused by name unless it has its neutral value,
and so is a field that nobody knows: a wish is never ignored in silence. Every error begins with the field's name.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from examples.data.chat import check_messages, encode_prompt
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.fields import dataclass_from_dict
from examples.rollout.request import Chunk
from examples.rollout.sampling import Sampling

# Accepted at this value only: what it stands for is not there.
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
}
IGNORED = ("user", "metadata", "store")  # say something about the caller, nothing about the answer


@dataclass(frozen=True)
class Limits:
    """What one client may ask for. choices: prompts times n. seconds: from the request to the last token."""

    body_bytes: int = 1 << 20
    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 13
    choices: int = 8
    concurrent: int = 256
    seconds: float = 300.0
    read_seconds: float = 20.0  # for a client to send its body
    write_seconds: float = 30.0  # for a client to make room for more

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name}: must be above 0; got {value}")


@dataclass(frozen=True)
class StreamOptions:
    """include_usage: one more event with the numbers of tokens."""

    include_usage: bool = False


@dataclass(frozen=True)
class Options:
    """The fields that both endpoints know; None and absent are one."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # not OpenAI's, but everybody's
    n: int = 1
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    logprobs: bool | int | None = None


@dataclass(frozen=True)
class Asked:
    """A body, understood. jobs: (prompt, sampling) of every choice."""

    options: Options
    chat: bool
    jobs: list[tuple[list[int], Sampling]]
    prompt_tokens: int
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def parse(
    body: Any, *, chat: bool, model: str, tokenizer: Tokenizer, limits: Limits, positions: int
) -> Asked:
    """A JSON body as what is asked; `UserError` whose first word is the field. positions: the model's context."""
    if not isinstance(body, Mapping):
        raise UserError(f"body: must be a JSON object; got {type(body).__name__}")
    values = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    for key, neutral in NEUTRAL.items():
        if key in values and (value := values.pop(key)) != neutral:
            raise UserError(f"{key}: is not supported and must be {neutral!r} or absent; got {value!r:.80}")
    content = "messages" if chat else "prompt"
    if content not in values:
        raise UserError(f"{content}: is missing and has no default")
    given = values.pop(content)
    options = dataclass_from_dict(Options, values)
    if options.model != model:
        raise UserError(f"model: must be {model!r}; got {options.model!r:.80}")
    options = replace(options, stop=(options.stop,) if isinstance(options.stop, str) else options.stop)
    if options.logprobs is not None and (options.logprobs not in ((False, True) if chat else (0,))):
        rule = "true or false" if chat else "0: the chosen tokens' own are given, no others"
        raise UserError(f"logprobs: must be {rule}; got {options.logprobs}")
    prompts = [chat_prompt(given, tokenizer)] if chat else plain_prompts(given, tokenizer)
    if not 1 <= options.n <= limits.choices // len(prompts):
        rule = f"in [1, {limits.choices // len(prompts)}] for {len(prompts)} prompts"
        raise UserError(f"n: must be {rule}; got {options.n}")
    longest = max(map(len, prompts))
    room = min(positions - longest, limits.max_tokens)
    if longest > limits.prompt_tokens or room < 1:
        most = min(limits.prompt_tokens, positions - 1)
        raise UserError(f"{content}: must have at most {most} tokens; got {longest}")
    wanted = options.max_completion_tokens or options.max_tokens
    if wanted is None:
        wanted = room if chat else min(16, room)
    if not 1 <= wanted <= room:
        name = "max_completion_tokens" if options.max_completion_tokens else "max_tokens"
        raise UserError(f"{name}: must be in [1, {room}] after {longest} tokens of prompt; got {wanted}")
    seed = secrets.randbits(62) if options.seed is None else options.seed
    if abs(seed) > 1 << 62:
        raise UserError(f"seed: must be within 62 bits; got {seed}")
    sampling = Sampling(
        max_tokens=wanted,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        stop=tuple(options.stop),
        stop_tokens=frozenset({tokenizer.eos_id}),
        deadline=limits.seconds,
    )
    jobs = [
        (prompt, replace(sampling, seed=seed + number)) for prompt in prompts for number in range(options.n)
    ]
    return Asked(options, chat, jobs, sum(map(len, prompts)))


def chat_prompt(messages: Any, tokenizer: Tokenizer) -> list[int]:
    """A conversation as tokens, up to where the answer begins. Content may be a list of text parts."""
    if isinstance(messages, list):
        messages = [_joined(message, number) for number, message in enumerate(messages)]
    return encode_prompt(tokenizer, check_messages(messages, "messages", answered=False))


def _joined(message: Any, number: int) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        raise UserError(f"messages: message {number}: parts of content must be text; got {parts!r:.80}")
    return {**message, "content": "".join(part["text"] for part in parts)}


def plain_prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Text, tokens, or a list of either; text gets the bos that every document was trained with."""
    several = (
        prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    )
    prompts = []
    for one in several:
        if isinstance(one, str):
            prompts.append([tokenizer.bos_id, *tokenizer.encode(one)])
        elif isinstance(one, list) and one and all(type(token) is int for token in one):
            wrong = [token for token in one if not 0 <= token < tokenizer.vocab_size]
            if wrong:
                raise UserError(f"prompt: tokens must be in [0, {tokenizer.vocab_size}); got {wrong[0]}")
            prompts.append(one)
        else:
            raise UserError(f"prompt: must be text, tokens, or a list of either; got {one!r:.80}")
    return prompts


# --- answers ----------------------------------------------------------------------------------------------------------


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; `param` is the field that the message begins with."""
    param = message.partition(":")[0] if kind == "invalid_request_error" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def finish_reason(reason: str | None) -> str | None:
    """OpenAI knows stop and length; a deadline is a limit on length in time."""
    return "length" if reason == "deadline" else reason


def logprobs_of(asked: Asked, chunk: Chunk, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The chosen tokens' log-probabilities, if they were asked for, in the endpoint's own shape."""
    if asked.options.logprobs is None or asked.options.logprobs is False:
        return None
    pieces = [tokenizer.bytes_of(token) for token in chunk.tokens]
    if not asked.chat:
        texts = [piece.decode(errors="replace") for piece in pieces]
        return {"tokens": texts, "token_logprobs": chunk.logprobs, "top_logprobs": None}
    content = [
        {"token": p.decode(errors="replace"), "bytes": list(p), "logprob": value, "top_logprobs": []}
        for p, value in zip(pieces, chunk.logprobs, strict=True)
    ]
    return {"content": content}


def usage(asked: Asked, answered: int, shared: int) -> dict[str, Any]:
    """Numbers of tokens; `cached_tokens` were found in pages of the cache."""
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": asked.prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": min(shared, asked.prompt_tokens)},
    }


def envelope(asked: Asked, choices: Sequence[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
    """What surrounds the choices of an answer or of one of its events."""
    kind = ("chat.completion.chunk" if streamed else "chat.completion") if asked.chat else "text_completion"
    prefix = "chatcmpl" if asked.chat else "cmpl"
    return {
        "id": f"{prefix}-{asked.name}",
        "object": kind,
        "created": asked.created,
        "model": asked.options.model,
        "choices": list(choices),
    }


def choice(
    asked: Asked, index: int, chunk: Chunk, tokenizer: Tokenizer, *, streamed: bool, first: bool = False
) -> dict[str, Any]:
    """One choice: all of it, or what a chunk adds."""
    value: dict[str, Any] = {"index": index, "finish_reason": finish_reason(chunk.finish)}
    value["logprobs"] = logprobs_of(asked, chunk, tokenizer)
    if not asked.chat:
        value["text"] = chunk.text
    elif streamed:
        value["delta"] = {**({"role": "assistant"} if first else {}), "content": chunk.text}
    else:
        value["message"] = {"role": "assistant", "content": chunk.text}
    return value
