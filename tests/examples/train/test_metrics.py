"""Metrics files survive kills and resumes; the terminal line says the truth."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.errors import UserError
from examples.train import metrics
from examples.train.metrics import MetricsWriter, Progress, read_metrics

json_values = st.one_of(
    st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text()
)


def write_steps(path, steps, **kw):
    with MetricsWriter(path, **kw) as writer:
        for step in steps:
            writer.write(step, loss=1 / (step + 1))


@given(values=st.dictionaries(st.text(min_size=1).filter(lambda s: s not in ("step", "self")), json_values))
def test_values_come_back_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("m") / "a" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(3, **values)
    writer.close()
    assert read_metrics(path) == [{"step": 3, **values}]
    assert path.read_bytes().count(b"\n") == 1


def test_tensors_numpy_and_non_finite_numbers(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write(
        1, a=torch.tensor(0.5), b=np.float32(0.25), c=np.int64(3), d=torch.tensor([1, 2]), e=True, f=None
    )
    writer.write(2, a=float("nan"), b=torch.tensor(float("inf")), c=[1.0, float("-inf")])
    writer.close()
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert first == {"step": 1, "a": 0.5, "b": 0.25, "c": 3, "d": [1, 2], "e": True, "f": None}
    assert second == {"step": 2, "a": None, "b": None, "c": [1.0, None]}


def test_every_line_is_on_disk_before_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    for step in range(3):
        writer.write(step)
        assert len(read_metrics(tmp_path / "m.jsonl")) == step + 1
    writer.close()
    writer.close()


def test_resume_leaves_the_file_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_steps(whole, range(10))
    write_steps(resumed, range(7))
    write_steps(resumed, range(5, 10), after_step=4)
    assert resumed.read_bytes() == whole.read_bytes()
    write_steps(resumed, [10, 11])  # without a step nothing is removed
    assert [r["step"] for r in read_metrics(resumed)] == list(range(12))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_line_is_dropped_by_readers_and_writers(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    os.truncate(path, path.stat().st_size - cut)
    complete = 3 if cut == 1 else 2  # only the newline is gone
    assert [r["step"] for r in read_metrics(path)] == list(range(complete))
    write_steps(path, range(complete, 5))
    assert [r["step"] for r in read_metrics(path)] == list(range(5))


def test_damage_in_the_middle_is_not_hidden(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step: 1'))
    for use in (lambda: read_metrics(path), lambda: MetricsWriter(path, after_step=1)):
        with pytest.raises(UserError, match="line 2 is damaged"):
            use()
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_metrics(path)
    with pytest.raises(UserError, match="reading"):
        read_metrics(tmp_path / "absent.jsonl")


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    writer.write(0)
    real = os.write

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for fake in (lambda fd, data: real(fd, data[:5]), full):
        monkeypatch.setattr(os, "write", fake)
        with pytest.raises(UserError, match="disk is full"):
            writer.write(1, loss=2.0)
        monkeypatch.setattr(os, "write", real)
        assert path.read_bytes() == b'{"step": 0}\n'
    writer.write(1)
    assert len(read_metrics(path)) == 2


def test_kill_leaves_complete_lines(tmp_path):
    code = (
        "import sys; from examples.train.metrics import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1]); i = 0\n"
        "while True: w.write(i, text='x' * 500); i += 1"
    )
    path = tmp_path / "m.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=os.getcwd())
    try:
        while not path.exists() or path.stat().st_size < 20_000:
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = [r["step"] for r in read_metrics(path)]
    assert steps == list(range(len(steps))) and len(steps) > 30


def test_tensorboard_mirror(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(
        metrics, "_open_tensorboard", lambda folder, after: calls.append((folder, after)) or Fake()
    )
    writer = MetricsWriter(tmp_path / "m.jsonl", after_step=2, tensorboard=tmp_path / "tb")
    writer.write(3, loss=torch.tensor(1.5), name="x", load=[1, 2], bad=float("nan"))
    writer.close()
    assert calls == [(tmp_path / "tb", 2), ("loss", 1.5, 3), "closed"]


def test_tensorboard_absent_is_fine(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write_steps(tmp_path / "m.jsonl", [1], tensorboard=tmp_path / "tb")
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_progress_line():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(10_000, done_tokens=2_000, every=5.0, stream=stream, clock=lambda: now[0])
    now[0] = 1.0
    line = progress.update(1, 3_000, torch.tensor(2.5), max_violation=0.5)
    assert re.fullmatch(
        r"step      1  loss  2\.5000   30\.0%  1\.00k tok/s  ETA 7s  MaxVio 0\.50  peak \d+\.\d\d GiB", line
    )
    now[0] = 3.0

    class Unread:
        def __float__(self):
            raise AssertionError("synchronised without need")

    assert progress.update(2, 5_000, Unread()) is None
    now[0] = 6.0
    assert "ETA 2s" in progress.update(3, 8_000, 2.0)
    now[0] = 6.1
    assert "100.0%" in progress.update(4, 10_000, 2.0)  # the end always prints
    assert stream.getvalue().count("\n") == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (61, "1m01s"), (3660, "1h01m"), (90000, "1d01h")]
)
def test_durations(seconds, text):
    assert metrics._duration(seconds) == text


def test_peak_memory_is_in_bytes():
    assert 2**25 < metrics.peak_memory_bytes() < 2**40
