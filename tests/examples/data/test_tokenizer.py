"""The tokenizer: exact round trips, V3's special tokens, the pre-tokeniser, and the punctuation split of
section 4.1."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.data import tokenizer as module
from examples.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from examples.errors import UserError

from .conftest import SAMPLE

_HARD = st.sampled_from(
    [*SPECIAL_TOKENS, ".\n\n", ");\r\n", "\u3042\u4e00", "😀", "e\u0301", "  \t", "1234567", "\0"]
)
_TEXT = st.lists(st.one_of(st.text(max_size=20), _HARD), max_size=8).map("".join)


@given(text=_TEXT)
def test_any_unicode_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values()), "data became a special token"
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert list(tokenizer.special_ids.values()) == list(range(9))
    assert tokenizer.special_ids["<｜fim▁begin｜>"] == tokenizer.fim_begin_id
    text = "<｜User｜>2+2?<｜Assistant｜>4<｜end▁of▁sentence｜>"
    ids = tokenizer.encode(text, allow_special=True)
    assert (ids[0], ids[-1]) == (tokenizer.user_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == "2+2?4"
    assert not tokenizer.token_bytes[:9].any()
    assert tokenizer.encode(text) == tokenizer.encode(text), "allow_special must not leak into later calls"
    assert not set(tokenizer.encode(text)) & set(range(9))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("漢字かなカナabc", ["漢字かなカナ", "abc"]),
        ("a.join(b)", ["a", ".join", "(b", ")"]),
        ("x = y;\n\nz", ["x", " =", " y", ";\n\n", "z"]),
        ("a   b", ["a", "  ", " b"]),
        ("a \n b", ["a", " \n", " b"]),
        ("don't", ["don", "'t"]),
        ("Größe", ["Größe"]),
    ],
)
def test_pre_tokeniser_cuts_where_deepseek_cuts(tokenizer, text, pieces):
    spans = [span for _, span in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in spans] == pieces


def test_training_is_reproducible_and_learns(tokenizer):
    again = Tokenizer.train([text * 4 for text in SAMPLE], 420)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size <= 420
    assert Tokenizer.train([text * 4 for text in SAMPLE], 300).fingerprint != tokenizer.fingerprint
    assert len(tokenizer.encode(SAMPLE[1])) < len(SAMPLE[1].encode()) / 2


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    for path in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("Hello, 世界 <｜User｜>") == tokenizer.encode("Hello, 世界 <｜User｜>")
    assert {p.name for p in (tmp_path / "tok").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_the_saved_folder_loads_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Größe 12345;\n\n日本語 def f(x):\n"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<｜begin▁of▁sentence｜>S<｜User｜>q<｜Assistant｜>a<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜>"
    )
    assert theirs.decode(tokenizer.encode(rendered, allow_special=True)) == rendered


def test_chat_tokens_of_a_released_file_are_not_found_in_data(tokenizer, tmp_path):
    """DeepSeek's own tokenizer.json has special=false for the chat and FIM tokens."""
    description = json.loads(tokenizer._backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["id"] < 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = Tokenizer.load(tmp_path)
    assert not set(loaded.encode("<｜User｜>hi<｜fim▁hole｜>")) & set(range(9))
    assert loaded.fingerprint == tokenizer.fingerprint


def test_errors_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="vocab_size must be at least 265, got 100"):
        Tokenizer.train(["a"], 100)
    with pytest.raises(UserError, match=r"tokenizer.json: No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path)
    description = json.loads(tokenizer._backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] != "<｜User｜>"]
    del description["model"]["vocab"]["<｜User｜>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="<｜User｜> must be in the vocabulary"):
        Tokenizer.load(tmp_path)


def _joined(tokenizer: Tokenizer, token: int) -> bool:
    """By another way than the code: does a token hold punctuation and then line breaks only?"""
    text = tokenizer.decode([token])
    body = text.strip("\r\n ")
    return text.endswith(("\n", "\r")) and bool(body) and not any(c.isalnum() or c == "\ufffd" for c in body)


def test_split_takes_every_joined_token_apart_at_share_one(tokenizer):
    text = "f(1);\n\ng(x).\n \n日本。\nend)\n\n\n" * 3
    ids = np.array([0, *tokenizer.encode(text), 1], dtype=np.uint32)
    joined = [i for i in ids[1:-1] if _joined(tokenizer, i)]
    assert len(joined) >= 6, "the sample must hold such tokens"
    split = tokenizer.split_punctuation_newline(ids, 1.0, np.random.default_rng(0))
    assert split.dtype == np.uint32
    assert not any(_joined(tokenizer, i) for i in split[1:-1])
    assert tokenizer.decode(split[1:-1]) == text
    assert (split[0], split[-1]) == (0, 1)


def test_split_takes_the_share_and_depends_on_the_generator_only(tokenizer):
    ids = np.array(tokenizer.encode("a;\n\n" * 4000), dtype=np.uint32)
    joined = sum(_joined(tokenizer, i) for i in set(ids.tolist()))
    assert joined == 1
    split = tokenizer.split_punctuation_newline(ids, 0.1, np.random.default_rng(1))
    assert 300 < len(split) - len(ids) < 500
    assert np.array_equal(split, tokenizer.split_punctuation_newline(ids, 0.1, np.random.default_rng(1)))
    assert not np.array_equal(split, tokenizer.split_punctuation_newline(ids, 0.1, np.random.default_rng(2)))
    assert np.array_equal(ids, tokenizer.split_punctuation_newline(ids, 0.0, np.random.default_rng(1)))


@given(text=st.text(alphabet="ab.;)\n\r 1日。", max_size=80), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_split_never_changes_the_text(tokenizer, text, share, seed):
    ids = np.array(tokenizer.encode(text), dtype=np.uint32)
    split = tokenizer.split_punctuation_newline(ids, share, np.random.default_rng(seed))
    assert tokenizer.decode(split) == text
    kept = [i for i in ids.tolist() if not _joined(tokenizer, i)]
    rest = iter(split.tolist())
    assert all(i in rest for i in kept), "tokens that are not joined must stay, in order"


def test_byte_alphabet_is_the_library_s():
    from tokenizers import pre_tokenizers

    assert sorted(module._byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert module._byte_alphabet()[ord(" ")] == "Ġ" and module._byte_alphabet()[10] == "Ċ"
