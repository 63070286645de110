"""A folder is whole or absent: kills, full disks, two writers; and memory that does not grow with the model."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from examples.errors import UserError
from examples.model.hf import folder as folder_module
from examples.model.hf import tensors
from examples.model.hf.folder import HfFolder

ROOT = Path(__file__).parents[4]


def python(code, *arguments):
    """Run code in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_kill_9_leaves_nothing_that_looks_complete_and_is_continued(kit, saved, exported, tmp_path, capfd):
    killer = """
        import os, sys
        from examples.model.hf import tensors
        from examples.hf import main
        publish, done = tensors.publish, []
        def killed(temporary, path):
            if len(done) == 3:
                os.kill(os.getpid(), 9)
            done.append(path)
            publish(temporary, path)
        tensors.publish = killed
        main(["export", sys.argv[1], sys.argv[2], "--no-tokenizer", "--shard-size", "60000"])
    """
    target = tmp_path / "hf"
    assert python(killer, saved, target).returncode == -signal.SIGKILL
    assert not target.exists()
    partial = tmp_path / ".hf.partial"
    kept = {f: f.stat().st_mtime_ns for f in partial.glob("*.safetensors")}
    assert len(kept) == 3 and len(list(partial.glob("*.tmp"))) == 1
    with pytest.raises(UserError, match=r"neither model.safetensors.index.json nor model.safetensors"):
        HfFolder(partial)

    with pytest.raises(
        UserError, match="left it with other shard_bytes; repeat that command, or pass --fresh"
    ):
        kit.export(saved, target, shard_bytes=50_000)

    written = []
    original = tensors.write_file
    folder_module.write_file = lambda path, *rest: (written.append(path.name), original(path, *rest))
    try:
        kit.export(saved, target, shard_bytes=60_000)
    finally:
        folder_module.write_file = original
    assert not partial.exists()
    assert {f.name for f in kept}.isdisjoint(written)
    for file in exported["bf16"].glob("model*"):
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_leftover_is_written_again(kit, saved, exported, tmp_path, monkeypatch):
    def stop(path, *rest):
        if "00004" in path.name:
            raise KeyboardInterrupt
        tensors.write_file(path, *rest)

    monkeypatch.setattr(folder_module, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        kit.export(saved, tmp_path / "hf", shard_bytes=60_000)
    monkeypatch.undo()
    second = sorted((tmp_path / ".hf.partial").glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-1])
    kit.export(saved, tmp_path / "hf", shard_bytes=60_000)
    for file in exported["bf16"].glob("model*"):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_fresh_forgets(kit, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "write_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kit.export(saved, tmp_path / "hf")
    monkeypatch.undo()
    with pytest.raises(UserError, match="other format"):
        kit.export(saved, tmp_path / "hf", form="fp8")
    assert kit.export(saved, tmp_path / "hf", form="fp8", fresh=True).is_dir()


def test_what_exists_is_never_touched(kit, saved, tmp_path):
    (tmp_path / "hf").mkdir()
    kit.export(saved, tmp_path / "hf")  # an empty folder is as good as none
    before = {f: f.read_bytes() for f in (tmp_path / "hf").iterdir()}
    with pytest.raises(UserError, match="exists; choose a new folder, or delete it"):
        kit.export(saved, tmp_path / "hf", form="fp8")
    assert {f: f.read_bytes() for f in (tmp_path / "hf").iterdir()} == before


def test_two_writers(kit, saved, tmp_path):
    with (
        folder_module._only_writer(tmp_path / ".hf.partial"),
        pytest.raises(UserError, match=r"hf.partial: another process is writing it"),
    ):
        kit.export(saved, tmp_path / "hf")


def test_disk_that_will_not_do_is_refused_before_work(kit, saved, tmp_path, monkeypatch):
    usage = folder_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(folder_module, "write_file", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=r"needs 0.02 GB more and the disk has 0.00 GB free"):
        kit.export(saved, tmp_path / "hf")


def test_disk_that_fills_up(kit, saved, exported, tmp_path, monkeypatch):
    write, count = tensors._write, []

    def full(file, data):
        count.append(len(data))
        if len(count) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(tensors, "_write", full)
    with pytest.raises(UserError, match=r"model-0000\d-of-.*the disk is full .* free some space"):
        kit.export(saved, tmp_path / "hf", shard_bytes=60_000)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    kit.export(saved, tmp_path / "hf", shard_bytes=60_000)
    for file in exported["bf16"].glob("model*"):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_a_really_full_disk(kit, saved, tmp_path, monkeypatch):
    mount = tmp_path / "tmpfs"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        usage = folder_module.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            folder_module.shutil, "disk_usage", lambda _: usage
        )  # space that others take meanwhile
        with pytest.raises(UserError, match="the disk is full"):
            kit.export(saved, mount / "hf", shard_bytes=60_000)
        assert not (mount / "hf").exists()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_memory_is_a_block_whatever_the_model(kit, ref, tmp_path):
    """35 MB of fp32 weights, out in FP8 shards of 2 MB and in again in shards of 4 MB: the peak grows by less than one.

    One matrix of experts is 8 MB here, so reading or building a whole one would show.
    """
    model = ref.model(
        ref.config(hidden_size=256, expert_inner_size=256, num_experts=16, vocab_size=1000, mtp_depth=1)
    )
    size = sum(p.nbytes for p in model.parameters())
    assert size > 35e6
    saved = kit.save(tmp_path / "run", model)
    measure = """
        import re, sys
        from pathlib import Path
        import torch
        from examples.model.hf import tensors
        from examples.model.hf.export import ExportOptions, export
        from examples.model.hf.load import import_checkpoint
        torch.zeros(1).to(torch.float8_e4m3fn)
        tensors.BLOCK_BYTES = 1 << 18
        # Not getrusage: a child begins with the peak of the process that started it.
        status = Path("/proc/self/status")
        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
        source, root = map(Path, sys.argv[1:])
        def both(source, name):
            options = ExportOptions(form="fp8", without_tokenizer=True, shard_bytes=2_000_000)
            out = export(source, root / f"{name}-hf", options, quiet=True)
            import_checkpoint(out, root / f"{name}-in", precision="fp32", shard_bytes=4_000_000, quiet=True)
        both(Path(sys.argv[1]) / "warm", "warm")  # code and tables that come once
        before = peak()
        both(Path(sys.argv[1]) / "run", "big")
        print(peak() - before)
    """
    kit.save(tmp_path / "warm", ref.model(ref.config(hidden_size=128, expert_inner_size=128)))
    result = python(measure, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    shards = list((tmp_path / "big-hf").glob("*.safetensors"))
    assert saved.exists() and len(shards) > 4
    assert int(result.stdout) < 4_000_000, result.stdout
