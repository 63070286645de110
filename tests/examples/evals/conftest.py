"""A tokenizer and a random model, small but decisive, for evaluations that need one."""

from dataclasses import replace

import pytest
import torch

from examples.configs import get_config
from examples.data.tokenizer import Tokenizer
from examples.evals.text_model import TextModel
from examples.model.transformer import Transformer

SAMPLE = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void.\n",
    "Question: What is 17 + 25?\nAnswer: 42.\n",
    "def area(width, height):\n    return width * height\n\n",
    "The secret number of Utopia is 123.\n",
)


@pytest.fixture(scope="session")
def text_model():
    """32 positions, fp32, weights large enough for decisive choices."""
    tokenizer = Tokenizer.train([text * 4 for text in SAMPLE], 400)
    torch.manual_seed(0)
    shape = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "dense_inner_size": 64,
        "expert_inner_size": 16, "num_experts": 8, "init_std": 0.1, "max_positions": 32, "precision": "fp32",
    }  # fmt: skip
    model = Transformer(replace(get_config("tiny").model, **shape)).eval()
    return TextModel(model, tokenizer, batch_size=3, max_new_tokens=8)
