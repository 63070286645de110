"""Fill-in-the-middle by prefix, suffix, middle (PSM), on whole documents before packing (report section 4.1).

A model that only ever continues cannot complete code inside a file. The report reorders one document in ten
so that the middle comes last:

    fim_begin prefix fim_hole suffix fim_end middle eos

How it cuts is not published. Here: two uniform cuts over the characters (not the tokens), so that a cut may
fall inside a word, as a cursor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class FimParts(NamedTuple):
    """A document in three parts; each may be empty. prefix + middle + suffix is the document."""

    prefix: str
    middle: str
    suffix: str


class FimTokens(Protocol):
    """The ids that the token order needs; `Tokenizer` has them."""

    fim_begin_id: int
    fim_hole_id: int
    fim_end_id: int
    eos_id: int


def apply_fim(text: str, rng: np.random.Generator, rate: float) -> FimParts | None:
    """With probability `rate` cut `text` in three, otherwise None. Draws the same numbers whatever the
    outcome."""
    chance, first, second = rng.random(3)
    if chance >= rate:
        return None
    low, high = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
    return FimParts(text[:low], text[low:high], text[high:])


def fim_order(
    tokenizer: FimTokens, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]
) -> list[int]:
    """The PSM token order: begin, prefix, hole, suffix, end, middle, eos."""
    return [
        tokenizer.fim_begin_id,
        *prefix,
        tokenizer.fim_hole_id,
        *suffix,
        tokenizer.fim_end_id,
        *middle,
        tokenizer.eos_id,
    ]
