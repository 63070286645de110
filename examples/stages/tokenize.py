"""Real text to token shards (report section 4.1): corpus, byte-level BPE, FIM, held-out documents."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.data.build import build_shards, format_table
from examples.data.corpus import load_corpus, training_sample
from examples.data.shards import ShardReader
from examples.data.tokenizer import Tokenizer
from examples.stages.stage import Context


def tokenizer_path(root: Path) -> Path:
    """Folder of the run's tokenizer."""
    return root / "tokenize" / "tokenizer"


def shards_path(root: Path) -> Path:
    """Folder of the run's shards, `train/` and `val/` in it."""
    return root / "tokenize" / "shards"


def open_data(root: Path) -> tuple[Tokenizer, dict[str, ShardReader], dict[str, ShardReader]]:
    """Tokenizer, training shards and held-out shards of a run; shards of another tokenizer are refused."""
    from examples.data.build import open_shards

    tokenizer = Tokenizer.load(tokenizer_path(root))
    folder = shards_path(root)
    train, val = (open_shards(folder, part, tokenizer.fingerprint) for part in ("train", "val"))
    return tokenizer, train, val


def run(context: Context) -> dict[str, Any]:
    """Train the tokenizer and write the shards; returns the table of sources."""
    data, model = context.config.data, context.config.model
    corpus = load_corpus(data.sources or None, user=data.user, max_bytes=data.max_bytes, log=_say)
    start = time.monotonic()
    tokenizer = Tokenizer.train(training_sample(corpus), data.vocab_size or model.vocab_size)
    tokenizer.save(tokenizer_path(context.root))
    _say(f"tokenizer: {tokenizer.vocab_size} tokens ({time.monotonic() - start:.1f} s)")
    rows = build_shards(
        corpus,
        tokenizer,
        shards_path(context.root),
        fim_rate=data.fim_rate,
        split_share=data.split_share,
        seed=data.seed,
        held_out_every=data.held_out_every,
        log=_say,
    )
    print(format_table(rows), flush=True)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "sources": [asdict(row) for row in rows],
    }


def _say(line: str) -> None:
    print(f"  {line}", flush=True)
