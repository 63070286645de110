"""Checkpoints: bit-exact, atomic under SIGKILL and a full disk, and refused when anything is wrong."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.errors import UserError
from examples.train import checkpoint
from examples.train.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from examples.train.rng import capture_rng, restore_rng

META = {"loader": {"epoch": 2, "big": 2**70}, "lr": 0.1 + 0.2, "names": ["a", None, True], "text": "≤"}


def tree(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"a.weight": torch.randn(5, 7, generator=g).bfloat16(), "empty": torch.zeros(0, 3)},
        "master": {"a.weight": torch.randn(5, 7, generator=g), "t": torch.randn(4, 6, generator=g).T},
        "ema": {
            "shadow": {"x": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])},
            "updates": torch.tensor(7),
        },
        "counts": torch.tensor([2**62, -1]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "fp8": torch.randn(9, generator=g).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }


def flat(tensors):
    return checkpoint._flatten(tensors)


def same_bits(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].contiguous().numpy(force=True).tobytes() == b[n].contiguous().numpy(force=True).tobytes()
        if a[n].dtype not in (torch.bfloat16, torch.float8_e4m3fn)
        else torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n in a
    )


def newest_file(path, suffix=".safetensors"):
    return next(p for p in path.iterdir() if p.name.endswith(suffix))


def test_round_trip_is_bit_exact(tmp_path):
    path = save_checkpoint(tmp_path, 12, tree(), META)
    got = load_latest(tmp_path)
    assert got.path == path and got.step == 12 and got.meta == META
    assert same_bits(got.tensors, tree()) and got.tensors.keys() == tree().keys()
    into = tree(seed=1)
    pointers = [t.data_ptr() for t in flat(into).values()]
    got = load_checkpoint(path, into=into)
    assert got.tensors is into and same_bits(into, tree())
    assert pointers == [t.data_ptr() for t in flat(into).values()]


def test_parameters_that_require_grad_load_in_place(tmp_path):
    layer = torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path, 0, {"model": dict(layer.named_parameters())}, {})
    other = torch.nn.Linear(3, 2)
    load_latest(tmp_path, into={"model": dict(other.named_parameters())})
    assert torch.equal(layer.weight, other.weight) and other.weight.requires_grad


@given(
    dtype=st.sampled_from(
        [torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.float64, torch.int32]
    ),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 100),
)
@settings(max_examples=15)
def test_any_bits_round_trip(tmp_path_factory, dtype, shape, seed):
    n = int(np.prod(shape)) * dtype.itemsize
    raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8))
    tensors = {"x": raw.view(dtype).reshape(shape) if n else torch.zeros(shape, dtype=dtype)}
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, 0, tensors, {})
    got = load_latest(run).tensors["x"]
    assert got.dtype == dtype and got.shape == tensors["x"].shape
    assert not n or torch.equal(got.reshape(-1).view(torch.uint8), raw)


def test_nothing_to_load(tmp_path):
    assert load_latest(tmp_path) is None and list_checkpoints(tmp_path / "absent") == []
    save_checkpoint(tmp_path, 0, {}, {"only": "meta"})
    got = load_latest(tmp_path, into={"a": {}})
    assert got.meta == {"only": "meta"} and load_latest(tmp_path).tensors == {}


def test_keeps_the_newest(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, tree(step), {"step": step}, keep=2)
        assert load_latest(tmp_path).meta == {"step": step}
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [".lock", "step-00000003", "step-00000004"]
    assert same_bits(load_checkpoint(list_checkpoints(tmp_path)[0]).tensors, tree(3))


def test_the_same_step_again_replaces_without_a_gap(tmp_path):
    for i in range(12):
        save_checkpoint(tmp_path, 3, tree(i), {"i": i}, keep=1)
        assert load_latest(tmp_path).meta == {"i": i} and len(list_checkpoints(tmp_path)) == 1


def test_an_abandoned_future_is_not_mixed_in(tmp_path):
    save_checkpoint(tmp_path, 9, tree(), {})
    with pytest.raises(UserError, match=r"step-00000009: is later than step 4"):
        save_checkpoint(tmp_path, 4, tree(), {})


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1
    file.write_bytes(content)


def forget_meta(path):
    """A manifest with a valid seal that does not list meta.json."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"], manifest["files"]["meta.json"]
    seal = hashlib.sha256(checkpoint._canonical(manifest)).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal}))


DAMAGE = {
    "forged manifest": (forget_meta, "meta.json is missing"),
    "flipped tensor bit": (lambda p: flip(newest_file(p), -1), "is corrupt, its SHA-256"),
    "flipped header bit": (lambda p: flip(newest_file(p), 12), "is corrupt, its SHA-256"),
    "truncated": (lambda p: os.truncate(newest_file(p), 100), "truncated or extended, 100 bytes instead of"),
    "extended": (lambda p: newest_file(p).open("ab").write(b"x"), "truncated or extended"),
    "missing tensors": (lambda p: newest_file(p).unlink(), "safetensors is missing"),
    "missing meta": (lambda p: (p / "meta.json").unlink(), "meta.json is missing"),
    "flipped meta": (lambda p: flip(p / "meta.json", 9), "meta.json is corrupt"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "not a checkpoint of examples.train"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "damaged or foreign"),
    "binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\x80\x04K\x01."), "damaged or foreign"),
    "foreign manifest": (lambda p: (p / "manifest.json").write_text('{"a": 1}'), "damaged or foreign"),
    "list manifest": (lambda p: (p / "manifest.json").write_text("[1]"), "damaged or foreign"),
    "edited manifest": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"step": 5', '"step": 6')
        ),
        "was altered",
    ),
    "stranger's file": (
        lambda p: (p / "more.safetensors").write_bytes(b"x"),
        "more.safetensors does not belong",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_its_reason(tmp_path, kind):
    save_checkpoint(tmp_path, 4, tree(4), {})
    path = save_checkpoint(tmp_path, 5, tree(5), {})
    damage, reason = DAMAGE[kind]
    damage(path)
    into = tree(1)
    for load in (lambda: load_checkpoint(path, into=into), lambda: load_latest(tmp_path)):
        with pytest.raises(UserError, match=reason):
            load()
    assert same_bits(into, tree(1))
    with pytest.raises(UserError, match=r"to go back to step-00000004, delete .*step-00000005"):
        load_latest(tmp_path)


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=25)
def test_any_flipped_bit_is_noticed(saved, position, bit):
    files = sorted(saved.iterdir())
    offset = position % sum(f.stat().st_size for f in files)
    for file in files:
        if offset < file.stat().st_size:
            break
        offset -= file.stat().st_size
    original = file.read_bytes()
    changed = bytearray(original)
    changed[offset] ^= 1 << bit
    file.write_bytes(changed)
    try:
        with pytest.raises(UserError):
            load_checkpoint(saved)
    finally:
        file.write_bytes(original)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), 5, tree(), META)


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    """DCP's default storage would unpickle `.metadata`; ours must not touch pickle at all."""
    import pickle

    path = save_checkpoint(tmp_path, 1, tree(), META)
    (path / ".metadata").write_bytes(b"cos\nabort\n(tR.")  # would end the process
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert same_bits(load_latest(tmp_path).tensors, tree())


def test_a_misfit_is_refused_before_anything_is_copied(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2, 3), "b": torch.ones(1)}, {})
    for into, reason in [
        ({"a": torch.zeros(2, 3)}, "has the tensor 'b', which this run does not use"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": {"x": torch.zeros(1), "y": torch.zeros(1)}},
            "lacks the tensor 'c/x' and 1 more",
        ),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(2)},
            r"'b' is float32\[1\] in the checkpoint and float32\[2\]",
        ),
        (
            {"a": torch.zeros(2, 3).bfloat16(), "b": torch.zeros(1)},
            r"'a' is float32\[2, 3\] .* bfloat16\[2, 3\]",
        ),
    ]:
        with pytest.raises(UserError, match=reason):
            load_checkpoint(path, into=into)
        assert not into["a"].any()
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"a": 3}, {}, "a must be a tensor or a dict; got int"),
        ({"a/b": torch.ones(1)}, {}, "without '/'"),
        ({1: torch.ones(1)}, {}, "key must be a string"),
        ({}, {"a": {"b": [torch.ones(1)]}}, r"meta.a.b\[0\]: must be JSON; got Tensor"),
        ({}, {"a": {1: 2}}, "meta.a: JSON keys are strings; got 1"),
        ({}, {"a": np.int64(1)}, "got int64"),
    ],
)
def test_what_cannot_be_saved(tmp_path, tensors, meta, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path, 0, tensors, meta)
    assert list_checkpoints(tmp_path) == []


def test_one_saver_at_a_time_and_dead_savers_are_cleaned(tmp_path):
    save_checkpoint(tmp_path, 1, tree(), {})
    folder = tmp_path / "checkpoints"
    for name in (".saving-00000002-dead", ".trash-step-00000000"):
        (folder / name).mkdir()
        (folder / name / "x").write_text("half")
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # even a shared one
        with pytest.raises(UserError, match="another process is saving"):
            save_checkpoint(tmp_path, 2, tree(), {})
        assert (folder / ".saving-00000002-dead").exists()  # may be the other's
    save_checkpoint(tmp_path, 2, tree(), {})
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "step-00000001", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """A 256 KiB tmpfs; without the right to mount, None."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", 0, b"size=256k") == 0
    yield tmp_path if mounted else None
    if mounted:
        libc.umount2(str(tmp_path).encode(), 2)


def test_full_disk_keeps_the_old_checkpoint(small_disk):
    if small_disk is None:
        pytest.skip("mounting a tmpfs needs root")
    save_checkpoint(small_disk, 1, tree(), META)
    for size in (40_000, 60_000, 10**6):  # fp32: the first fits once, not twice
        big = {"x": torch.zeros(size)}
        try:
            save_checkpoint(small_disk, 2, big, {}, keep=9)
        except UserError as error:
            assert "the disk is full" in str(error)
        else:
            assert size == 40_000
    assert [p.name for p in list_checkpoints(small_disk)] == ["step-00000001", "step-00000002"]
    assert not [p for p in (small_disk / "checkpoints").iterdir() if p.name.startswith((".saving", ".trash"))]
    assert same_bits(load_checkpoint(list_checkpoints(small_disk)[0]).tensors, tree())


@pytest.mark.parametrize("where", ["fsync", "rename", "mkdir", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_anywhere_keeps_the_old_checkpoint(tmp_path, monkeypatch, where, code):
    save_checkpoint(tmp_path, 1, tree(), META)

    def broken(*_args, **_kw):
        raise OSError(code, os.strerror(code))

    if where == "write":
        monkeypatch.setattr(checkpoint, "_write", broken)
    else:
        monkeypatch.setattr(os, where, broken)
    with pytest.raises(UserError, match="the disk is full" if code == errno.ENOSPC else "Input/output error"):
        save_checkpoint(tmp_path, 2, tree(2), {})
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [".lock", "step-00000001"]
    assert same_bits(load_latest(tmp_path).tensors, tree())


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from examples.train import checkpoint
from examples.train.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint

def state(step):
    return {"a": torch.full((3000,), float(step)), "b": {"c": torch.full((500,), step)}}

def save_forever(run, step, die_at):
    calls = 0
    def counted(function):
        def call(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kw)
        return call
    if die_at:
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
    while True:
        step += 1
        save_checkpoint(run, step, state(step), {"step": step}, keep=1)
        os.write(report, b"%d\\n" % step)

run = Path(sys.argv[1])
save_checkpoint(run, 0, state(0), {"step": 0})
rng = random.Random(int(sys.argv[2]))
step = 0
for trial in range(int(sys.argv[3])):
    read, report = os.pipe()
    die_at = trial + 1 if trial < 40 else 0
    child = os.fork()
    if child == 0:
        try:
            save_forever(run, step, die_at)
        finally:
            os._exit(3)
    os.close(report)
    if not die_at:
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"trial {trial}: the child ended with {status}"
    reported = [step, *map(int, os.read(read, 1 << 20).split())]
    os.close(read)
    got = load_latest(run)
    assert got.step >= reported[-1], (trial, got.step, reported)  # what save_checkpoint returned for is safe
    assert got.step <= reported[-1] + 1
    assert got.meta == {"step": got.step}
    assert torch.equal(got.tensors["a"], state(got.step)["a"]) and torch.equal(got.tensors["b"]["c"], state(got.step)["b"]["c"])
    for path in list_checkpoints(run):
        load_checkpoint(path)  # a half removed one must not look complete
    step = got.step
save_checkpoint(run, step + 1, state(step + 1), {})
left = sorted(p.name for p in (run / "checkpoints").iterdir())
assert left == sorted([".lock", *(p.name for p in list_checkpoints(run))]), left
print("steps", step)
"""


def test_kill_nine_at_any_moment(tmp_path):
    """A child saves in a loop and is killed, first at each of its file-system calls in turn, then at random times."""
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path), "1", "50"]
    result = subprocess.run(command, check=False, cwd=Path.cwd(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) > 20


def test_rng_resumes_exactly():
    def draw():
        normal = torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]
        return normal, torch.randint(99, (4,)).tolist(), np.random.randint(99), random.random()

    draw()
    state = json.loads(
        json.dumps(capture_rng())
    )  # odd numbers of gauss draws: the spare one is part of the state
    want = draw()
    draw()
    restore_rng(state)
    assert draw() == want


TWO_RANKS = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from examples.errors import UserError
from examples.train.checkpoint import load_latest, save_checkpoint

run = Path(sys.argv[1])
child = os.fork()
dist.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=int(child == 0), world_size=2)
mesh = DeviceMesh("cpu", [0, 1])
whole = torch.arange(40.0).view(10, 4)
save_checkpoint(run, 7, {"sharded": distribute_tensor(whole, mesh, [Shard(0)]), "same": torch.ones(3)}, {"n": 2})
into = {"sharded": distribute_tensor(torch.zeros(10, 4), mesh, [Shard(1)]), "same": torch.zeros(3)}
assert load_latest(run, into=into).step == 7  # under another sharding
assert torch.equal(into["sharded"].full_tensor(), whole) and torch.equal(into["same"], torch.ones(3))
try:
    save_checkpoint(run, 6, {"same": torch.ones(3)}, {})
except UserError as error:
    assert "is later than step 6" in str(error)
else:
    raise AssertionError("every rank must hear of rank 0's error")
dist.destroy_process_group()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_two_ranks_save_and_one_process_loads(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", TWO_RANKS, str(tmp_path)]
    result = subprocess.run(command, check=False, cwd=Path.cwd(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    got = load_latest(tmp_path)
    assert torch.equal(got.tensors["sharded"], torch.arange(40.0).view(10, 4)) and got.meta == {"n": 2}
    assert len(list(got.path.glob("*.safetensors"))) == 2
