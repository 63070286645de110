"""Text as it grows: whole characters only, and stop strings found whatever the pieces."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.rollout.text import StopStrings, TextStream


def one_by_one(text, stops):
    """The meaning: characters come one by one, and the first stop string that is complete ends the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    matcher, shown, found = StopStrings(stops), "", False
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        if found:
            break
        # Nothing is held back without need: what is held begins a stop string.
        assert not matcher.held or any(stop.startswith(matcher.held) for stop in stops)
    if not found:
        shown += matcher.flush()
    assert (shown, found) == one_by_one("".join(pieces), stops)


def test_characters_are_never_split(tokenizer):
    text = "über 日本語 🙂🙃 the cat é\u0301"
    stream, seen = TextStream(tokenizer), ""
    ids = tokenizer.encode(text)
    assert any(len(tokenizer.bytes_of(i)) == 1 and tokenizer.bytes_of(i)[0] > 127 for i in ids)
    for token in ids:
        piece, _ = stream.push(token)
        assert "\ufffd" not in piece
        seen += piece
    assert seen + stream.flush()[0] == text


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_decode_as_the_tokenizer_does(tokenizer, seed):
    """Broken UTF-8 and special tokens included."""
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(300)]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token)[0] for token in ids) + stream.flush()[0]
    assert text == tokenizer.decode(ids, skip_special=True)


def test_bytes_of_agrees_with_the_lengths_that_evaluation_counts(tokenizer):
    lengths = [len(tokenizer.bytes_of(i)) for i in range(tokenizer.vocab_size)]
    assert lengths == tokenizer.token_bytes.tolist()
    assert tokenizer.bytes_of(10**6) == b""


def test_a_cut_character_can_complete_a_stop_string(tokenizer):
    (first, *_) = tokenizer.encode("ö")
    stream = TextStream(tokenizer, ["a\ufffd"])
    assert [stream.push(t) for t in (*tokenizer.encode("a"), first)] == [("", False), ("", False)]
    assert stream.flush() == ("", True)
