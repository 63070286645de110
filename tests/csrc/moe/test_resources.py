"""What ptxas makes of the MoE kernels for sm_90a: registers, spills, local memory, blocks on an SM. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REGISTER_FILE, GRANULE = 65536, 8
# File: kernel -> (instantiations, threads, blocks that must fit on an SM by registers).
KERNELS = {
    "route": {
        "route_kernel": (8, 128, 3),
        "route_backward_kernel": (2, 128, 8),
        "clear_kernel": (1, 128, 16),
    },
    "balance": {
        "balance_count_kernel": (2, 128, 8),
        "balance_tokens_kernel": (2, 128, 6),
        "balance_total_kernel": (1, 256, 1),
        "update_bias_kernel": (1, 256, 1),
        "clear_kernel": (1, 128, 16),
    },
    "permute": {
        "plan_kernel": (1, 1024, 1),
        "move_rows_kernel": (5, 128, 8),
        "move_scales_kernel": (1, 256, 6),
    },
    "unpermute": {
        "unpermute_kernel": (8, 128, 6),
        "unpermute_backward_kernel": (4, 128, 6),
        "invert_kernel": (1, 256, 8),
    },
}


@pytest.mark.parametrize("file", KERNELS)
def test_no_spills_and_enough_blocks_on_an_sm(file, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    command += [
        "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
        "-cubin",
        "-o",
        str(tmp_path / "x"),
    ]
    result = subprocess.run(
        [*command, str(ROOT / f"csrc/moe/{file}.cu")], capture_output=True, text=True, check=False
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0 and "spilled" not in log and "Local memory" not in log, log
    found = dict.fromkeys(KERNELS[file], 0)
    for block in log.split("Compiling entry function")[1:]:
        name = re.search(r"\d([a-z_]+_kernel)[IE]", block.split("'")[1])[1]
        _, threads, fitting = KERNELS[file][name]
        found[name] += 1
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in block, name
        assert REGISTER_FILE // (-(-registers // GRANULE) * GRANULE * threads) >= fitting, (
            f"{name}: {registers}"
        )
    assert found == {name: count for name, (count, _, _) in KERNELS[file].items()}
