"""What ptxas makes of a kernel file for sm_90a: registers, spills, local memory. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Entry:
    """One kernel: its mangled name and registers."""

    name: str
    registers: int

    def blocks(self, threads: int) -> int:
        """How many fit on an SM by registers: warps are dealt to 4 schedulers with 512 registers a lane each."""
        warps = -(-threads // 32)
        per_scheduler = 512 // (-(-self.registers // 8) * 8)
        return 4 * per_scheduler // warps


def compile_kernels(source: str, folder: Path) -> list[Entry]:
    """The kernels of csrc/<source>; skips without nvcc, fails where one spills, uses local memory or is serialised."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    command += ["-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"]
    result = subprocess.run(
        [*command, "-o", str(folder / Path(source).stem), str(ROOT / "csrc" / source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    assert "spilled" not in log and "Local memory" not in log and "(C75" not in log, log
    entries = []
    for block in log.split("Compiling entry function")[1:]:
        name = block.split("'")[1]
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in block, name
        found = re.search(r"Used (\d+) registers", block)
        assert found is not None
        entries.append(Entry(name, int(found[1])))
    return entries
