"""Conversations as the released model reads them, and which of their tokens are learnt.

The released form is: bos, system text, then for every turn `<｜User｜>` question `<｜Assistant｜>` answer eos. It is built from
token ids, not from one rendered string: the text of a message is data, and data that contains `<｜Assistant｜>` must not
become the token. What counts as a label is every answer and the eos that ends it, in all turns; nothing that a user or
a system prompt says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.data.files import disk_errors
from examples.data.tokenizer import Tokenizer
from examples.data.user import LINE_BYTES
from examples.errors import UserError

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatSample:
    """One encoded conversation. ids: its tokens, bos first. answer: for each, whether it is to be learnt as a label."""

    ids: list[int]
    answer: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def chat(question: str, answer: str, system: str = "") -> list[dict[str, str]]:
    """The messages of one turn."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_messages(messages: Any, where: str, *, answered: bool = True) -> list[dict[str, str]]:
    """The messages if they are a conversation: maybe a system text, then user and assistant in turns.

    answered: the last message must be the assistant's (to train on), else the user's (to continue). `UserError` with
    `where` says what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list with at least one message; got {messages!r:.80}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: message {number} must have 'role' and 'content'; got {message!r:.80}")
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}: message {number}: role must be {', '.join(ROLES)}; got {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            raise UserError(
                f"{where}: message {number}: content must be text; got {message['content']!r:.80}"
            )
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[0] == "system" else turns
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)
    end = "assistant" if answered else "user"
    if turns != wanted or not turns or turns[-1] != end:
        raise UserError(
            f"{where}: after an optional system message, user and assistant must take turns and {end} must be last; "
            f"got {[message['role'] for message in messages]}"
        )
    return messages


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> ChatSample:
    """A conversation as token ids and which of them are answers; see `check_messages` for what is allowed."""
    ids, answer = [tokenizer.bos_id], [False]

    def add(new: list[int], learnt: bool) -> None:
        ids.extend(new)
        answer.extend([learnt] * len(new))

    for message in messages:
        text = tokenizer.encode(message["content"])
        if message["role"] == "system":
            add(text, False)
        elif message["role"] == "user":
            add([tokenizer.user_id, *text], False)
        else:
            add([tokenizer.assistant_id], False)
            add([*text, tokenizer.eos_id], True)
    return ChatSample(ids, answer)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A conversation that ends with the user's message, up to where the answer begins."""
    return [*encode_chat(tokenizer, messages).ids, tokenizer.assistant_id]


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a user's JSON lines, streamed, each with "file:line" for errors."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: must be a .jsonl file; got {path.suffix or 'no ending'!r}")
    with disk_errors(path, "reading"), open(path, "rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == LINE_BYTES:
                raise UserError(f"{where}: a line may have at most {LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                line.decode()
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: a line must be an object; got {type(record).__name__}")
            yield where, record


def read_chats(path: str | Path) -> Iterator[list[dict[str, str]]]:
    """The conversations of a user's JSON lines, `{"messages": [{"role": ..., "content": ...}, ...]}`, streamed."""
    for where, record in json_lines(path):
        if "messages" not in record:
            raise UserError(f"{where}: a line must be an object with a field 'messages'")
        yield check_messages(record["messages"], where)
