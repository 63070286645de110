"""The gap of pairs of runs: which steps count, and how a mean over seeds is judged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import fp8_gap


def write_pair(folder: Path, ratio: float, steps: int = 100) -> None:
    """Two runs whose losses differ by a constant ratio; one of them stopped a step earlier."""
    for stage, factor, count in (("pretrain", 1.0, steps), ("fp8", ratio, steps - 1)):
        (folder / stage).mkdir(parents=True)
        lines = [{"step": i, "loss": factor * (5 - i / steps), "tokens": i} for i in range(1, count + 1)]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = {"result": {"held_out": {"loss": factor * 4.0}}}
        (folder / stage / "done.json").write_text(json.dumps(done))


def test_gap_of_a_constant_ratio(tmp_path: Path) -> None:
    write_pair(tmp_path, 1.002)
    gap = fp8_gap.measure(tmp_path)
    assert gap == pytest.approx({"curve": 0.2, "held_out": 0.2})


@pytest.mark.parametrize("ratios, status", [((1.004, 0.997), 0), ((1.004, 1.003), 1)])
def test_mean_over_seeds_decides(tmp_path, monkeypatch, capsys, ratios, status) -> None:
    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--run-dir") + 1])
        seed = int(folder.name.rsplit("_", 1)[1])
        assert f"train.seed={seed}" in command and f"data.seed={seed}" in command
        write_pair(folder, ratios[seed])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert fp8_gap.main(["--seeds", "2", "--run-dir", str(tmp_path)]) == status
    result = json.loads((tmp_path / "gaps.json").read_text())
    assert result["curve"]["mean"] == pytest.approx(100 * (sum(ratios) / 2 - 1))
    assert ("OUTSIDE" in capsys.readouterr().out) == bool(status)


def test_a_failed_run_ends_the_bench(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 130))
    assert fp8_gap.main(["--seeds", "2", "--run-dir", str(tmp_path)]) == 130
