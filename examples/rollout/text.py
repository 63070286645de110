"""Tokens to text as it grows: no UTF-8 character in halves, no stop string shown.

A token of byte-level BPE is bytes, and a character may need several tokens. Text leaves a `TextStream` only when it
cannot change any more: whole characters, and nothing that may still become a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from examples.data.tokenizer import Tokenizer


class StopStrings:
    """Finds the stop string that ends first, whatever the pieces that text arrives in; of those that end together, the
    longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self.stops = tuple(stops)
        self.held = ""  # the longest end of the text so far that begins a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found). After that, call it no more."""
        if not self.stops:
            return text, False
        text = self.held + text
        # Any match begins in what was held or later, or else the whole of it would have been held.
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        longest = min(max(map(len, self.stops)) - 1, len(text))
        size = next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0
        )
        self.held = text[len(text) - size :]
        return text[: len(text) - size], False

    def flush(self) -> str:
        """What was held, when no more text comes."""
        held, self.held = self.held, ""
        return held


class TextStream:
    """The text of one answer. Special tokens have no text; bytes that are not UTF-8 become U+FFFD, as in `decode`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.matcher = tokenizer, StopStrings(stops)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> tuple[str, bool]:
        """(text that this token completes, whether a stop string was found: then the answer ends before it)."""
        return self.matcher.push(self.decoder.decode(self.tokenizer.bytes_of(token)))

    def flush(self) -> tuple[str, bool]:
        """The rest, at the end of an answer; a cut character may itself complete a stop string."""
        text, found = self.matcher.push(self.decoder.decode(b"", final=True))
        return (text, True) if found else (text + self.matcher.flush(), False)
