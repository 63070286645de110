"""What the engine's tests share: a random tiny model with decisive choices, a byte tokenizer, pools that must end free."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.configs import get_config
from examples.data.tokenizer import Tokenizer
from examples.model.transformer import Transformer


def make_model(vocab_size: int = 97, **changes) -> Transformer:
    torch.manual_seed(0)
    config = replace(get_config("tiny").model, vocab_size=vocab_size, init_std=0.08, precision="fp32")
    return Transformer(replace(config, **changes)).eval()


@pytest.fixture(scope="session")
def engine_model() -> Transformer:
    """Random weights, large enough that near-ties do not happen."""
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, special tokens and a few merges."""
    text = ["the cat sat on the mat\n\nüber ünder 日本語 日本 🙂🙂🙃 the the cat"] * 4
    return Tokenizer.train(text, 320)


@pytest.fixture(scope="session")
def text_model(tokenizer) -> Transformer:
    """The same for the tokenizer's vocabulary."""
    return make_model(tokenizer.vocab_size)
