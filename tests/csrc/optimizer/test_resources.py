"""What ptxas makes of the optimizer's kernels for sm_90a: registers, spills, blocks on an SM. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Kernel: instantiations, threads of a block, blocks that must fit on an SM by registers.
KERNELS = {
    "adamw": {"adamw_kernel": (8, 256, 4)},
    "adamw_quantize": {"adamw_quantize_kernel": (8, 256, 3)},
    "grad_norm": {"grad_norm_kernel": (1, 256, 6), "clip_scale_kernel": (1, 256, 1)},
}


@pytest.mark.parametrize("file", KERNELS)
def test_no_spills_and_enough_blocks_on_an_sm(file, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    strict = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"
    source = ROOT / f"csrc/optimizer/{file}.cu"
    command = [nvcc, "-std=c++20", "-O3", arch, strict, "-cubin", "-o", str(tmp_path / file), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    assert "spilled" not in log and "Local memory" not in log, log
    blocks = log.split("Compiling entry function")[1:]
    assert len(blocks) == sum(count for count, _, _ in KERNELS[file].values())
    for kernel, (count, threads, fitting) in KERNELS[file].items():
        reports = [b for b in blocks if kernel in b.split("'")[1]]
        assert len(reports) == count
        for report in reports:
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            assert 65536 // (-(-registers // 8) * 8 * threads) >= fitting, f"{kernel}: {registers} registers"
