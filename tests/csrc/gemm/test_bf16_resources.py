"""What ptxas made of bf16_gemm for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS.

Needs nvcc, no GPU.
"""

from __future__ import annotations

import re

from bench.kernels import families
from tests.csrc import building

from .test_bf16_gemm import MAJORS, TILES

KERNEL = re.compile(r"bf16_gemm_kernelIN\S*?ConfigILi(\d+)ELi(\d+)ELN6hopper5MajorE(\d)ELS\d_(\d)ELi(\d)E")
VARIANTS = [f"{m}x{n} {majors} x{cluster}" for m, n in TILES for majors in MAJORS for cluster in (1, 2)]


def variant(mangled: str) -> str | None:
    found = KERNEL.search(mangled)
    if found is None:
        return None
    rows, columns, a, b, cluster = found.groups()
    return f"{rows}x{columns} {'km'[int(a)]}{'km'[int(b)]} x{cluster}"


def test_no_spills_and_no_serialised_wgmma():
    found = {variant(kernel.mangled): kernel for kernel in building.resources("bf16_gemm")}
    kernels = {name: k.registers for name, k in found.items() if name}
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(VARIANTS, 168)


def test_sass_holds_the_schedule():
    code = {variant(mangled): code for mangled, code in building.instructions("bf16_gemm").items()}
    for name in VARIANTS:
        tile, majors, cluster = name.split()
        found, text = families(code[name]), "\n".join(code[name])
        waves = 2 if tile == "256x128" else 1
        # Four steps of K to a slice, back to back; one wait that leaves the newest slice in flight, one for all.
        assert found["HGMMA"] == 4 * waves, name
        assert found["WARPGROUP"] >= 3 and found["USETMAXREG"] == 2, name
        assert found["UTMALDG"] >= 2 and found["UTMASTG"] >= 1 and found["STSM"] >= 4, name
        assert not {"STL", "LDL", "HMMA"} & set(found), name
        assert ("MULTICAST" in text) == (cluster == "x2"), name
        assert ("tnspA" in text) == (majors[0] == "m"), name
        assert ("tnspB" in text) == (majors[1] == "m"), name
