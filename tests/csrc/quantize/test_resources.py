"""What ptxas makes of the quantisers for sm_90a: registers, spills, local memory, blocks on an SM. No GPU needed."""

from __future__ import annotations

import pytest

from tests.csrc import building

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


@pytest.mark.parametrize(
    "file, kernel, threads, count, blocks", KERNELS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_no_spills_and_enough_blocks_on_an_sm(file, kernel, threads, count, blocks):
    found = [k for k in building.resources(file) if kernel in k.mangled]
    assert len(found) == count
    for k in found:
        name = k.mangled
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
        if vectorised and kind in blocks:
            assert k.blocks_by_registers(threads) >= blocks[kind], f"{k.name}: {k.registers} registers"
