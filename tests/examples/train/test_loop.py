"""The training loop: resumes to the bit, micro-batches add up, balances experts, survives signals, says what is wrong."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.errors import UserError
from examples.stages.tokenize import open_data
from examples.train.checkpoint import list_checkpoints, load_checkpoint
from examples.train.loop import Trainer
from examples.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[3]


def trainer(config, root, folder):
    _, train, val = open_data(root)
    return Trainer(config, folder, train, val)


def everything(run):
    """All state of a finished folder: tensors, and the JSON side of it."""
    checkpoint = load_checkpoint(list_checkpoints(run)[-1])

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}/")
            else:
                yield prefix + key, value

    return dict(flat(checkpoint.tensors)), checkpoint.meta


def assert_same_run(a, b):
    (left, left_meta), (right, right_meta) = everything(a), everything(b)
    assert left.keys() == right.keys() and len(left) > 100
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert left_meta == right_meta

    def lines(run):
        rows = read_metrics(run / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]

    assert lines(a) == lines(b)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_resume_is_bit_exact(micro, tokenized, tmp_path, precision):
    config = replace(micro, model=replace(micro.model, precision=precision))
    whole = trainer(config, tokenized, tmp_path / "whole")
    whole.run()
    part = trainer(config, tokenized, tmp_path / "part")
    for _ in range(5):
        part.train_step()
    part.save()
    del part
    resumed = trainer(config, tokenized, tmp_path / "part")
    assert resumed.step == 5
    # Metrics of the first five steps were not written by hand-driven steps; give both files the same beginning.
    (tmp_path / "part" / "metrics.jsonl").write_text(
        "".join(
            line + "\n"
            for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
            if json.loads(line)["step"] <= 5
        )
    )
    resumed.run()
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_kill_nine_at_any_step_and_resume(command, tokenized, tmp_path):
    """The command is killed without warning, twice, at different moments; the result is that of an unbroken run."""
    import shutil

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        shutil.copytree(tokenized, root)

    def start(root):
        return subprocess.Popen(
            [*command, "--run-dir", str(root), "--stages", "pretrain"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    for steps in (2, 8):
        process = start(broken)
        metrics = broken / "pretrain" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
    last = start(broken)
    output = last.communicate(timeout=120)[0]
    assert last.returncode == 0, output
    assert "continuing from step" in output
    other = start(whole)
    assert other.communicate(timeout=120) and other.returncode == 0
    assert_same_run(whole / "pretrain", broken / "pretrain")


def test_ctrl_c_saves_and_continues(command, run_folder):
    process = subprocess.Popen(
        [*command, "train.schedule.total_tokens=100000", "--run-dir", str(run_folder / "new")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_folder / "new" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.strip() == "interrupted; the same command continues from the last checkpoint"
    step = load_checkpoint(list_checkpoints(run_folder / "new" / "pretrain")[-1]).step
    assert step == max(r["step"] for r in read_metrics(metrics) if "loss" in r)


def test_micro_batches_add_up_to_the_whole_batch(micro, tokenized, tmp_path):
    losses, grads = [], []
    for name, size in (("one", 0), ("many", 1), ("uneven", 3)):
        config = replace(
            micro, model=replace(micro.model, precision="fp32"), train=replace(micro.train, micro_batch=size)
        )
        run = trainer(config, tokenized, tmp_path / name)
        outputs = run._backward(run._micro_batches(4), 0.3)
        losses.append(sum(float(o.main) for o in outputs))
        grads.append(run.optimizer.grads)
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-6)
        for name, value in grads[0].items():
            torch.testing.assert_close(grad[name], value, rtol=1e-4, atol=1e-6)


def test_twins_start_from_the_same_weights_in_every_precision(micro, tokenized, tmp_path):
    masters = [
        trainer(
            replace(micro, model=replace(micro.model, precision=p)), tokenized, tmp_path / p
        ).optimizer.masters
        for p in ("bf16", "fp8")
    ]
    for name in masters[0]:
        assert torch.equal(masters[0][name], masters[1][name]), name


def test_a_loss_that_is_not_finite_never_reaches_the_weights(micro, tokenized, tmp_path, monkeypatch):
    run = trainer(micro, tokenized, tmp_path / "run")
    run.train_step()
    before = {n: m.clone() for n, m in run.optimizer.masters.items()}
    real = type(run)._backward

    def poisoned(self, batches, mtp_weight):
        outputs = real(self, batches, mtp_weight)
        next(iter(self.optimizer.grads.values())).view(-1)[0] = float("nan")
        return outputs

    monkeypatch.setattr(type(run), "_backward", poisoned)
    assert run.train_step()["updated"] is False
    assert all(torch.equal(before[n], m) for n, m in run.optimizer.masters.items())
    monkeypatch.setattr(type(run), "_backward", real)
    assert run.train_step()["updated"] is True


def test_schedules_reach_the_optimizer_and_the_router(micro, tokenized, tmp_path, monkeypatch):
    run = trainer(micro, tokenized, tmp_path / "run")
    speeds = []
    monkeypatch.setattr(run.model, "update_bias", speeds.append)
    records = [run.train_step() for _ in range(12)]
    assert run.finished and run.tokens == 1536
    schedule = micro.train.schedule
    for i, record in enumerate(records):
        assert record["lr"] == schedule.learning_rate(i, i * 128)
        assert record["mtp_weight"] == schedule.mtp_weight(i * 128)
        assert speeds[i] == schedule.bias_speed(i * 128)
    assert records[0]["mtp_weight"] == 0.3 and records[-1]["mtp_weight"] == 0.1 and speeds[-1] == 0


def test_a_vocabulary_that_does_not_fit_is_refused(run_folder, capsys):
    from examples.run import main

    from .conftest import MICRO

    status = main(
        [
            "tiny",
            "--run-dir",
            str(run_folder / "x"),
            *MICRO,
            "data.vocab_size=500",
            "--stages",
            "tokenize,pretrain",
        ]
    )
    assert status == 2
    assert "model.vocab_size: must be at least the tokenizer's 500; got 384" in capsys.readouterr().err


def test_needs_tokens_first(micro, tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        open_data(tmp_path)
