"""What ptxas made of fp8_gemm_decode for sm_90a: registers, spills, and the instructions in the SASS. No GPU needed."""

from __future__ import annotations

import re

from bench.kernels import families
from tests.csrc import building

THREADS, TOKENS = 288, (8, 16, 32, 64)
BLOCKS = {(tokens, cluster): 1 if cluster or tokens == 64 else 2 for tokens in TOKENS for cluster in (0, 1)}
KERNEL = re.compile(r"fp8_decode_kernelIN\S*?ConfigILi(\d+)ELb([01])E")


def variant(text: str) -> tuple[int, int] | None:
    found = KERNEL.search(text)
    return found and (int(found[1]), int(found[2]))


def test_no_spills_and_the_blocks_fit_by_registers():
    found = {variant(kernel.mangled): kernel for kernel in building.resources("fp8_decode")}
    assert found.keys() == BLOCKS.keys()
    for key, kernel in found.items():
        assert kernel.blocks_by_registers(THREADS) >= BLOCKS[key], key


def test_sass_holds_the_schedule():
    code = {variant(mangled): code for mangled, code in building.instructions("fp8_decode").items()}
    for (tokens, cluster), blocks in BLOCKS.items():
        instructions = [i.split()[0] for i in code[tokens, cluster]]
        found = families(instructions)
        unrolled, rest = divmod(found["QGMMA"], 4)  # the loop over slices may be unrolled
        assert unrolled > 0 and rest == 0 and blocks
        assert found["FFMA"] == unrolled * tokens // 2
        assert found["UTMALDG"] >= 3
        assert not {"STL", "LDL", "RED", "ATOM", "ATOMG"} & set(found)
        # Pieces travel by bulk copies: no barrier of GPU scope but those of the cluster at the start and at the end.
        assert ("UBLKCP" in found) == bool(cluster)
        assert instructions.count("MEMBAR.ALL.GPU") == 2 * cluster
