"""A run folder with text, tokenizer and shards, and a model small enough to train in a second."""

import sys

import pytest

from examples.configs import get_config, parse_overrides

# Half a megabyte of the standard library, a 1.5-second tokenizer, and a model of 60k parameters.
MICRO = [
    "data.sources=python,maths",
    "data.weights=none",
    "data.max_bytes=150000",
    "data.held_out_every=4",
    "data.seq_len=32",
    "data.shuffle_rows=8",
    "train.schedule.sequence_length=32",
    "train.schedule.total_tokens=1536",
    "train.schedule.batch_size.start=4",
    "train.schedule.batch_size.end=4",
    "train.schedule.mtp_weight.switch=1024",
    "train.schedule.bias_speed.switch=1408",
    "train.checkpoint_every=3",
    "train.eval_every=5",
    "model.vocab_size=384",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=8",
    "model.dense_inner_size=64",
    "model.expert_inner_size=16",
    "model.num_experts=8",
    "model.max_positions=128",
    "train.micro_batch=3",
    "extend.yarn.original_max=32",
    "extend.first.sequence_length=64",
    "extend.first.batch_size=4",
    "extend.first.steps=4",
    "extend.second.sequence_length=128",
    "extend.second.batch_size=2",
    "extend.second.steps=3",
    "extend.micro_batch=3",
    "extend.checkpoint_every=3",
    "extend.eval_blocks=2",
    "extend.needles=1",
]


@pytest.fixture(scope="session")
def micro():
    """The configuration: 12 steps of 4 rows of 32 tokens, in micro-batches of 3 and 1 rows."""
    return parse_overrides(get_config("tiny"), MICRO)


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory, micro):
    """A run folder in which `tokenize` has finished."""
    from examples.run import main

    root = tmp_path_factory.mktemp("run") / "micro"
    assert main(["tiny", "--run-dir", str(root), "--stages", "tokenize", "--threads", "1", *MICRO]) == 0
    return root


@pytest.fixture
def run_folder(tokenized, tmp_path):
    """A private copy of the tokenized run folder."""
    import shutil

    root = tmp_path / "run"
    shutil.copytree(tokenized, root)
    return root


@pytest.fixture(scope="session")
def command():
    """The command line of a micro run, for subprocesses."""
    return [sys.executable, "-m", "examples.run", "tiny", "--threads", "1", *MICRO]
