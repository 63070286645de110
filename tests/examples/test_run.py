"""The command line: every mistake is one clear line and status 2, nothing on disk is damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.run import main

REPOSITORY = Path(__file__).parents[2]


def error_of(capsys, *arguments):
    """Status 2 and exactly one line on stderr, which is returned."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_is_one_line(capsys, tmp_path):
    run = ["--run-dir", str(tmp_path / "run")]
    assert "must be one of tiny" in error_of(capsys, "tinny", *run)
    assert "did you mean 'train.ema_decay'" in error_of(capsys, "tiny", "train.ema_deca=1", *run)
    assert "--stages: must be among" in error_of(capsys, "tiny", "--stages", "cook", *run)
    assert "--threads" in error_of(capsys, "tiny", "--threads", "0", *run)
    assert "unknown source 'klingon'" in error_of(
        capsys, "tiny", "data.sources=klingon", "data.weights=none", "--stages", "tokenize", *run
    )


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    message = error_of(capsys, "tiny", "--run-dir", str(tmp_path), "--fresh")
    assert "must be a run folder, or new or empty" in message
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_another_configuration_names_the_first_difference(capsys, tmp_path):
    run = ["--run-dir", str(tmp_path / "run"), "--stages", "report"]
    assert main(["tiny", *run]) == 2  # nothing to report, but the folder now belongs to this configuration
    capsys.readouterr()
    message = error_of(capsys, "tiny", "model.hidden_size=64", *run)
    assert "was made with model.hidden_size=128 but this command asks for 64" in message


def test_a_stage_whose_input_is_missing_says_so(capsys, tmp_path):
    for stage in ("pretrain", "evaluate", "generate", "report"):
        message = error_of(capsys, "tiny", "--run-dir", str(tmp_path / "run"), "--stages", stage)
        assert f"stage '{stage}' needs stage" in message


def test_full_disk(tmp_path):
    """A real file system of 400 KB: the run stops with one line, and what is there is intact."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        arguments = ["tiny", "--run-dir", str(disk / "run"), "--stages", "tokenize"]
        arguments += [
            "data.sources=python",
            "data.weights=none",
            "data.max_bytes=2000000",
            "model.vocab_size=512",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "examples.run", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and "full" in lines[0]
        json.loads((disk / "run" / "config.json").read_text())
        assert not (disk / "run" / "tokenize" / "done.json").exists()
        assert not list((disk / "run").rglob("corpus.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_truncated_shard_and_foreign_tokenizer(capsys, tmp_path):
    from .train.conftest import MICRO

    run = ["--run-dir", str(tmp_path / "run"), "--threads", "1", *MICRO]
    assert main(["tiny", *run, "--stages", "tokenize"]) == 0
    capsys.readouterr()
    shards = sorted((tmp_path / "run" / "tokenize" / "shards" / "train" / "python").glob("*"))
    shard = max(shards, key=os.path.getsize)
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert shard.name in error_of(capsys, "tiny", *run, "--stages", "pretrain")
    shard.write_bytes(content)
    tokenizer = tmp_path / "run" / "tokenize" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"content":', '"content" :', 1))  # same meaning
    text = json.loads(tokenizer.read_text())
    text["model"]["merges"] = text["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(text))
    assert "tokenizer" in error_of(capsys, "tiny", *run, "--stages", "pretrain")
