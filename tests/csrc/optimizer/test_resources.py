"""What ptxas makes of the optimizer's kernels for sm_90a: registers, spills, blocks on an SM. No GPU needed."""

from __future__ import annotations

import pytest

from tests.csrc import building

# Kernel: instantiations, threads of a block, blocks that must fit on an SM by registers.
KERNELS = {
    "adamw": {"adamw_kernel": (8, 256, 4)},
    "adamw_quantize": {"adamw_quantize_kernel": (8, 256, 3)},
    "grad_norm": {"grad_norm_kernel": (1, 256, 6), "clip_scale_kernel": (1, 256, 1)},
}


@pytest.mark.parametrize("file", KERNELS)
def test_no_spills_and_enough_blocks_on_an_sm(file):
    kernels = building.resources(file)
    assert len(kernels) == sum(count for count, _, _ in KERNELS[file].values())
    for name, (count, threads, fitting) in KERNELS[file].items():
        found = [kernel for kernel in kernels if name in kernel.mangled]
        assert len(found) == count
        for kernel in found:
            assert kernel.blocks_by_registers(threads) >= fitting, (
                f"{kernel.name}: {kernel.registers} registers"
            )
