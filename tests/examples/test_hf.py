"""The command line `python -m examples.hf`: every way once, and errors of one line with status 2."""

import pytest
import torch

from examples.configs import get_config
from examples.errors import UserError
from examples.fields import to_dict
from examples.hf import main, parse_size
from examples.model.transformer import Transformer
from examples.train.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint of a small FP8 model in the stage `pretrain`."""
    from dataclasses import replace

    torch.manual_seed(0)
    config = replace(
        get_config("tiny").model,
        precision="fp8",
        vocab_size=64,
        hidden_size=64,
        num_layers=2,
        num_experts=4,
        top_k=2,
    )
    root = tmp_path_factory.mktemp("run")
    meta = {"config": {"model": to_dict(config)}}
    save_checkpoint(root / "pretrain", 3, {"model": Transformer(config).state_dict()}, meta)
    return root


def test_out_in_and_around(run, tmp_path, capsys):
    def call(*arguments):
        status = main([str(a) for a in arguments])
        return status, capsys.readouterr()

    status, said = call(
        "export", run, tmp_path / "hf", "--no-tokenizer", "--shard-size", "100kB", "--format", "fp8"
    )
    assert status == 0 and "done: " in said.out and "B/s)" in said.out
    assert call("import", tmp_path / "hf", tmp_path / "in", "--precision", "fp8")[0] == 0
    assert (
        call(
            "export",
            tmp_path / "in",
            tmp_path / "hf2",
            "--no-tokenizer",
            "--shard-size",
            "100kB",
            "--format",
            "fp8",
        )[0]
        == 0
    )
    for file in (tmp_path / "hf").glob("model*"):
        assert (tmp_path / "hf2" / file.name).read_bytes() == file.read_bytes()
    assert call("convert", "to-official", tmp_path / "hf", tmp_path / "ranks", "--mp", "1", "--mtp")[0] == 0
    assert call("convert", "to-hf", tmp_path / "ranks", tmp_path / "hf3", "--shard-size", "100kB")[0] == 0
    for file in (tmp_path / "hf").glob("model*"):
        assert (tmp_path / "hf3" / file.name).read_bytes() == file.read_bytes()

    errors = [
        (
            ("export", run / "nothing", tmp_path / "x"),
            "must be a run folder, a stage's folder, or a checkpoint",
        ),
        (("export", run, tmp_path / "x", "--stage", "sft", "--no-tokenizer"), "--stage names another"),
        (("export", run, tmp_path / "hf", "--no-tokenizer"), "exists; choose a new folder"),
        (("export", run, tmp_path / "x", "--no-tokenizer", "--weights", "ema"), "--weights trained has them"),
        (("export", run, tmp_path / "x", "--shard-size", "big"), "--shard-size: must be a size such as 5GB"),
        (("import", "deepseek-ai/DeepSeek-V3", tmp_path / "x"), "must be a local folder"),
        (("import", tmp_path / "hf", tmp_path / "in"), "already has checkpoints"),
        (
            ("convert", "to-official", tmp_path / "hf", tmp_path / "x", "--mp", "3"),
            "--mp: must divide the 4 experts",
        ),
        (("convert", "to-hf", tmp_path / "hf", tmp_path / "x"), "must hold the rank files of one split"),
    ]
    for arguments, message in errors:
        status, said = call(*arguments)
        assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
        assert message in said.err
        assert not (tmp_path / "x").exists()


def test_an_altered_checkpoint_is_refused(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (file,) = copy.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["export", str(copy), str(tmp_path / "x"), "--no-tokenizer"]) == 2
    assert "is corrupt, its SHA-256 does not agree" in capsys.readouterr().err


def test_sizes():
    assert [parse_size(t) for t in ("5GB", "500M", "1e6", "1.5 kB", "7")] == [
        5 * 10**9,
        5 * 10**8,
        10**6,
        1500,
        7,
    ]
    for text in ("", "0", "-1", "5 stones", "1.2.3"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(text)
