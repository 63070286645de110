"""What ptxas makes of the MoE kernels for sm_90a: registers, spills, local memory, blocks on an SM. No GPU needed."""

from __future__ import annotations

import re

import pytest

from tests.csrc import building

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
def test_no_spills_and_enough_blocks_on_an_sm(file):
    found = dict.fromkeys(KERNELS[file], 0)
    for kernel in building.resources(file):
        name = re.search(r"\d([a-z_]+_kernel)[IE]", kernel.mangled)[1]
        _, threads, fitting = KERNELS[file][name]
        found[name] += 1
        assert kernel.blocks_by_registers(threads) >= fitting, f"{kernel.name}: {kernel.registers} registers"
    assert found == {name: count for name, (count, _, _) in KERNELS[file].items()}
