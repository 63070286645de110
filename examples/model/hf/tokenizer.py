"""The tokenizer's files of a folder: `tokenizer.json`, which is ours as it is, and what transformers needs beside it.

A released DeepSeek tokenizer passes through as the files it is. One that we trained carries the released tokens and chat
template and is a `PreTrainedTokenizerFast`, which promises nothing but to run tokenizer.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from examples.data.files import disk_errors, read_json, write_json
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def find_tokenizer(near: Path) -> Path | None:
    """The tokenizer's folder of a checkpoint, stage, run, or imported folder: in it or in the run that it is part of."""
    for folder in (near, *list(near.resolve().parents)[:3]):
        for candidate in (folder / "tokenize" / "tokenizer", folder / "tokenizer"):
            if (candidate / "tokenizer.json").exists():
                return candidate
    return None


def check_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Load it; every id must have a row in the model."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model {vocab_size} rows for them"
        )
    return tokenizer


def copy_tokenizer(source: Path, target: Path, *, longest: int | None = None) -> None:
    """Copy the files that are there, byte for byte; make the configuration if there is none.

    longest: put in as `model_max_length`, for one that does not say.
    """
    tokenizer = Tokenizer.load(source)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
    config_file = target / "tokenizer_config.json"
    if not config_file.exists():
        tokenizer.save(target)  # the flags of added tokens may change, their ids do not
        if (source / "tokenizer.json").exists():
            shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    config: dict[str, Any] = read_json(config_file)
    if longest is not None and "model_max_length" not in config:
        write_json(config_file, {**config, "model_max_length": longest})
