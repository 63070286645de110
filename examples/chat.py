"""A conversation with a trained run in the terminal: `python -m examples.chat runs/tiny`.

Answers appear as they are generated. /reset forgets the conversation, /system TEXT sets the system prompt (and forgets),
Ctrl-C stops an answer (what was said stays), Ctrl-D or /quit leaves. In a pipe every line of the input is a turn, and
answers alone are written to the output: `echo "2+2?" | python -m examples.chat runs/tiny`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from examples.errors import UserError

if TYPE_CHECKING:
    from examples.rollout.engine import Engine


@dataclass
class Conversation:
    """What has been said, and how to go on. The oldest turns are forgotten when the context is full."""

    engine: Engine
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self, system: str | None = None) -> None:
        """Forget every turn; with `system`, begin with another system prompt ("" for none)."""
        if system is None:
            self.messages = [m for m in self.messages if m["role"] == "system"]
        else:
            self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self) -> list[int]:
        """Tokens up to where the answer begins, without turns that leave no room for it."""
        from examples.data.chat import encode_prompt

        tokenizer, config = self.engine.tokenizer, self.engine.config
        room = min(self.engine.model.config.max_positions, config.pages * 64) - self.max_tokens
        while len(ids := encode_prompt(tokenizer, self.messages)) > room:
            turns = [n for n, m in enumerate(self.messages) if m["role"] != "system"]
            if len(turns) < 3:
                raise UserError(
                    f"message: must leave room for an answer: at most {room} tokens; got {len(ids)}"
                )
            del self.messages[turns[0] : turns[0] + 2]
        return ids

    def say(self, text: str, out: TextIO) -> None:
        """One turn: the answer is written as it comes. Ctrl-C ends it early."""
        from examples.rollout.sampling import Sampling

        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            eos = self.engine.tokenizer.eos_id
            request = self.engine.submit(
                self.prompt(),
                Sampling(
                    self.max_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=self.seed + len(self.messages),
                    stop_tokens=frozenset({eos}),
                ),
            )
            for chunk in self.engine.stream(request):
                said += chunk.text
                out.write(chunk.text)
                out.flush()
            if request.finish == "error":
                raise UserError(f"answer: {request.error}")
        except KeyboardInterrupt:
            out.write(" [stopped]")
        except UserError:
            self.messages.pop()
            raise
        out.write("\n")
        out.flush()
        self.messages.append({"role": "assistant", "content": said})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m examples.chat", description=__doc__.split("\n\n")[0])
    arguments.add_argument("run", type=Path, help="a run folder of examples.run")
    arguments.add_argument("--stage", help="whose weights (default: the last stage that has any)")
    arguments.add_argument("--system", default="", help="system prompt")
    arguments.add_argument("--max-tokens", type=int, default=96, help="of one answer (default %(default)s)")
    arguments.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default %(default)s)")
    arguments.add_argument("--top-p", type=float, default=0.95, help="nucleus (default %(default)s)")
    arguments.add_argument("--seed", type=int, help="the same answers again (default: drawn)")
    arguments.add_argument("--speculative", action="store_true", help="MTP drafts")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        return _chat(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # the reader of a pipe has gone; the interpreter shall not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _chat(options: argparse.Namespace) -> int:
    from examples.rollout.engine import Engine, EngineConfig
    from examples.rollout.load import load_run
    from examples.rollout.sampling import Sampling

    Sampling(options.max_tokens, options.temperature, options.top_p)  # checked before the model is loaded
    loaded = load_run(options.run, options.stage)
    context = loaded.model.config.max_positions
    if options.max_tokens >= context:
        raise UserError(
            f"--max-tokens: must be below the context of {context} tokens; got {options.max_tokens}"
        )
    pages = 2 * -(-context // 64)  # this conversation, and what it can share of the one before
    config = EngineConfig(pages=pages, max_running=1, speculative=options.speculative)
    engine = Engine(loaded.model, config, tokenizer=loaded.tokenizer)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    talk = Conversation(engine, options.max_tokens, options.temperature, options.top_p, seed)
    talk.reset(options.system)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  line editing and history for input()

        print(
            f"{loaded.stage}, step {loaded.step}; /reset, /system TEXT, Ctrl-C stops an answer, Ctrl-D leaves"
        )
        if not loaded.chats:
            print("(these weights were never trained on conversations: expect continuations, not answers)")
    status = 0
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return status
        except KeyboardInterrupt:  # at the prompt: drop the line
            print()
            continue
        if not terminal and not line:
            return status
        status = max(status, _turn(talk, line.strip(), strict=not terminal))
        if line.strip() == "/quit":
            return status


def _turn(talk: Conversation, line: str, *, strict: bool) -> int:
    """One line: a command or a message. What is wrong is said, and the conversation goes on; a pipe ends with 2."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/system":
        talk.reset(rest.strip())
    elif command.startswith("/") and command != "/quit":
        print(f"{command}: there is no such command; /reset, /system TEXT, /quit", file=sys.stderr)
        return 2 if strict else 0
    elif line and command != "/quit":
        try:
            talk.say(line, sys.stdout)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if strict else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
