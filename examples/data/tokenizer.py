"""Byte-level BPE with DeepSeek's pre-tokeniser and V3's special tokens (report section 4.1, "Data
Construction").

Why the released token strings at any vocabulary size: chat templates, FIM prompts and serving engines that
know DeepSeek-V3 then work with our tiny model unchanged. Why HF `tokenizers`: it trains and runs, has the
regular expressions that this pre-tokeniser needs, and its file loads in transformers, vLLM and SGLang. Data
is never trusted: text that contains `<｜end▁of▁sentence｜>` is encoded as the characters it is, unless the
caller asks for special tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from examples.data.files import disk_errors, write_atomic, write_json
from examples.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT, EOT = "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"
# Ids 0..8 in this order. V3 has the first three there too; the other six it keeps at 128800..128805.
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

# The pre-tokeniser, in the order in which it cuts. A piece is never merged across a cut.
DIGITS = r"\p{N}{1,3}"
CJK_RUN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# One ASCII punctuation mark that leads a word (.join, _name) | letters with the space or other single
# character before them | punctuation with the line breaks after it (the tokens that section 4.1 splits again)
# | line breaks | spaces.
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# The released chat form: bos, system, then User question Assistant answer eos, as often as needed.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    f"{{% elif m['role'] == 'user' %}}{USER}{{{{ m['content'] }}}}"
    f"{{% elif m['role'] == 'assistant' %}}{ASSISTANT}{{{{ m['content'] }}}}{{{{ eos_token }}}}"
    f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def _new_backend(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (DIGITS, CJK_RUN, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
        self.special_ids: dict[str, int] = {token: i for token, i in ids.items() if i is not None}
        if missing := [token for token, i in ids.items() if i is None]:
            raise UserError(f"tokenizer: the special tokens {', '.join(missing)} must be in the vocabulary")
        self.bos_id, self.eos_id, self.pad_id = (self.special_ids[token] for token in (BOS, EOS, PAD))
        self.fim_hole_id, self.fim_begin_id, self.fim_end_id = (
            self.special_ids[token] for token in (FIM_HOLE, FIM_BEGIN, FIM_END)
        )
        self.user_id, self.assistant_id, self.eot_id = (self.special_ids[t] for t in (USER, ASSISTANT, EOT))
        self._backend = backend
        self._backend.encode_special_tokens = True  # special strings in data are plain characters

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` tokens (special tokens and the 256 bytes included) from `documents`, read once.

        The result depends on the documents only. A small corpus may not hold enough pairs: then `vocab_size`
        of the result is smaller than asked for.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise UserError(f"tokenizer: vocab_size must be at least {SMALLEST_VOCAB}, got {vocab_size}")
        backend = _new_backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(documents, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json`, or the folder that holds one (ours or a released DeepSeek one)."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        with disk_errors(file, "reading"):
            content = file.read_text(encoding="utf-8")
        try:
            # DeepSeek's file marks its chat tokens as not special; then the library would find them in data
            # too.
            description = json.loads(content)
            for token in description["added_tokens"]:
                token["special"] = True
            backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{file}: not a tokenizer.json ({error})") from error
        return cls(backend)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `path`; transformers loads the
        folder."""
        folder = Path(path)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        write_atomic(folder / "tokenizer.json", self._backend.to_str(pretty=True).encode())
        write_json(folder / "tokenizer_config.json", config)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without bos or eos. `allow_special` turns special strings (of a chat template, never
        of data) into their tokens."""
        backend = self._special_backend if allow_special else self._backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all threads that TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS allow."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Exact for ids that `encode` gave; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of text that a token stands for: part of a character, perhaps; none for special tokens and for ids
        that are not in the vocabulary."""
        return self._bytes.get(int(token), b"")

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        values = {character: byte for byte, character in enumerate(_byte_alphabet())}
        added = set(self._backend.get_added_tokens_decoder())
        vocabulary = self._backend.get_vocab().items()
        return {i: bytes(values[character] for character in t) for t, i in vocabulary if i not in added}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides ids: vocabulary, merges, added tokens and pre-tokeniser, as
        canonical JSON. Shards carry it, so that a model never reads ids of another tokenizer."""
        full = json.loads(self._backend.to_str())
        merges = [m.split(" ") if isinstance(m, str) else m for m in full["model"]["merges"]]
        content = {
            "vocab": full["model"]["vocab"],
            "merges": merges,
            "added": sorted((token["id"], token["content"]) for token in full["added_tokens"]),
            "pre_tokenizer": full["pre_tokenizer"],
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: how many bytes of text each token stands for (0 for special tokens)."""
        lengths = np.zeros(self.vocab_size, dtype=np.uint16)
        added = set(self._backend.get_added_tokens_decoder())
        for token, i in self._backend.get_vocab().items():
            if i not in added:
                lengths[i] = len(token)  # one character of the byte alphabet per byte
        return lengths

    def split_punctuation_newline(
        self, ids: np.ndarray, share: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Split a random `share` of the tokens that join punctuation and line breaks (section 4.1).

        Such tokens (")\\n\\n") make a prompt that ends without a line break a text never seen in training:
        the "token boundary bias". The report splits "a certain proportion" and does not publish it. Text does
        not change.

        Args:
            ids: [n] uint32; rng: one generator per document makes the result independent of the order of
            work.
        Returns:
            [m] uint32, m >= n, with the same decoding.
        """
        start, length, parts = self._split_table
        candidates = np.flatnonzero(length[ids])
        if share <= 0 or not len(candidates):
            return ids
        chosen = candidates[rng.random(len(candidates)) < share]
        counts = np.ones(len(ids), dtype=np.int64)
        counts[chosen] = length[ids[chosen]]
        result = np.repeat(ids, counts)
        places = np.repeat(
            np.cumsum(counts)[chosen] - counts[chosen], counts[chosen]
        )  # first place of each split token
        within = np.arange(len(places)) - np.repeat(
            np.cumsum(counts[chosen]) - counts[chosen], counts[chosen]
        )
        result[places + within] = parts[np.repeat(start[ids[chosen]], counts[chosen]) + within]
        return result

    @cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @cached_property
    def _split_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per token id: where its parts start, how many they are (0: cannot be split), and all parts in a
        row."""
        start = np.zeros(self.vocab_size, dtype=np.int64)
        length = np.zeros(self.vocab_size, dtype=np.int64)
        parts: list[int] = []
        byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
        for token, i in sorted(self._backend.get_vocab().items(), key=lambda item: item[1]):
            if i in self.special_ids.values() or not all(c in byte_of for c in token):
                continue
            try:
                text = bytes(byte_of[c] for c in token).decode()
            except UnicodeDecodeError:  # part of a character
                continue
            marks = text.rstrip("\r\n")
            body = marks.removeprefix(" ")
            if marks == text or not body or any(unicodedata.category(c)[0] not in "PS" for c in body):
                continue
            pieces = self.encode(marks) + self.encode(text[len(marks) :])
            start[i], length[i] = len(parts), len(pieces)
            parts += pieces
        return start, length, np.array(parts, dtype=np.uint32)


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes with: printable Latin-1 as itself, the
    rest from U+0100 on in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
