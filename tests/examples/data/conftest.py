"""Fixtures of the data tests: a small tokenizer and shards with known content."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from examples.data.shards import ShardReader, ShardWriter
from examples.data.tokenizer import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SAMPLE = (
    'def area(width, height):\n    """The area."""\n    return width * height;\n\nprint(area(123, 67));\n\n',
    "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void;\n",
    "Größe: 12,5 €.\n\n日本語のテキスト。\nПривет, мир!\n\n",
    "Question: What is 17 + 25?\nAnswer: 42.\n",
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text * 4 for text in SAMPLE], 420)


@pytest.fixture
def make_reader(tmp_path: Path) -> Callable[..., ShardReader]:
    """Shards of documents given as lists of ids; `token_bytes` says id % 7."""

    def make(
        documents: Sequence[Sequence[int]],
        name: str = "source",
        per_shard: int = 64,
        fingerprint: str = "ab" * 32,
    ) -> ShardReader:
        folder = tmp_path / name
        table = (np.arange(100_000) % 7).astype(np.uint16)
        with ShardWriter(folder, name, fingerprint, per_shard, token_bytes=table) as writer:
            for document in documents:
                writer.add(np.array(document, dtype=np.uint32))
        return ShardReader(folder)

    return make
