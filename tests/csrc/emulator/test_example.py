"""csrc/emulator/example: a kernel outside of the Python package, built by its own script."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.csrc.building import EMULATOR, objects

FOLDER = EMULATOR[0].parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_example_runs_and_reports(tmp_path):
    # The script takes objects that are newer than their sources: it compiles the shortest and the fibers itself.
    own = ("fence.cpp", "fiber.cpp")
    given = [source for source in EMULATOR if source.name not in own]
    for source, compiled in zip(given, objects(given), strict=True):
        shutil.copyfile(compiled, tmp_path / f"{source.stem}.o")
    script = str(FOLDER / "example" / "build.sh")
    good = subprocess.run([script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout) == (0, "30 schedules, no hazards\n"), good.stdout + good.stderr
    bad = subprocess.run(
        [script, str(tmp_path), "-DWITHOUT_FENCE"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert "[proxy]" in bad.stdout
    assert "bulk store at reverse.cu:" in bad.stdout
