"""What ptxas makes of the quantisers for sm_90a: registers, spills, local memory, blocks on an SM. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REGISTER_FILE, GRANULE = 65536, 8
# Kernel, threads, kernels in the file, blocks of the vectorised bf16 / fp32 version that must fit on an SM by registers.
KERNELS = [
    ("quantize_rows", "quantize_rows_kernel", 128, 4, {"bf16": 8, "float": 5}),
    ("quantize_columns", "quantize_columns_kernel", 256, 12, {"bf16": 3, "float": 2, "e4m3": 2, "e5m6": 2}),
    ("quantize_blocks", "quantize_blocks_kernel", 256, 8, {"bf16": 3, "float": 2}),
    ("quantize_blocks", "transpose_blocks_kernel", 256, 2, {}),
    ("pack_e5m6", "pack_e5m6_tiles_kernel", 128, 4, {"bf16": 8, "float": 4}),
    ("pack_e5m6", "pack_e5m6_rows_kernel", 256, 4, {"bf16": 5, "float": 4}),
    ("unpack_e5m6", "unpack_e5m6_kernel", 256, 4, {"bf16": 6, "float": 6}),
    ("dequantize", "dequantize_rows_kernel", 256, 6, {"bf16": 6, "float": 6}),
    ("dequantize", "dequantize_columns_kernel", 256, 6, {"bf16": 4, "float": 4}),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("quantize")
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    strict = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"

    def build(name: str) -> str:
        source = ROOT / f"csrc/quantize/{name}.cu"
        command = [nvcc, "-std=c++20", "-O3", arch, strict, "-cubin", "-o", str(folder / name), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    return {name: build(name) for name in dict.fromkeys(kernel[0] for kernel in KERNELS)}


@pytest.mark.parametrize(
    "file, kernel, threads, count, blocks", KERNELS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_no_spills_and_enough_blocks_on_an_sm(log, file, kernel, threads, count, blocks):
    assert "spilled" not in log[file] and "Local memory" not in log[file], log[file]
    found = [b for b in log[file].split("Compiling entry function")[1:] if kernel in b.split("'")[1]]
    assert len(found) == count
    for block in found:
        name = block.split("'")[1]
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in block, name
        vectorised = name[: name.index("EEv")].endswith("Lb1")
        kinds = {"4bf16": "bf16", "4e4m3": "e4m3", "4e5m6": "e5m6"}
        kind = next(
            (
                kind
                for part, kind in kinds.items()
                if f"I{part}" in name or f"N6hopper{part}" in name or f"kernels{part}" in name
            ),
            "float",
        )
        fitting = REGISTER_FILE // (-(-registers // GRANULE) * GRANULE * threads)
        if vectorised and kind in blocks:
            assert fitting >= blocks[kind], f"{name}: {registers} registers, {fitting} blocks"
