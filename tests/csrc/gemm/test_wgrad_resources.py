"""What ptxas made of fp8_wgrad for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS."""

from __future__ import annotations

import re

from bench.kernels import families
from deepseek_ops._gemm_checks import FP8_WGRAD_TILES
from tests.csrc import building

VARIANTS = {
    f"{rows}x{columns} {d} x{cluster}": columns // (2 if rows == 64 else 1)
    for rows, columns in FP8_WGRAD_TILES
    for d in ("bf16", "fp32")
    for cluster in (1, 2)
}
KERNEL = re.compile(r"fp8_wgrad_kernelIN\S*?ConfigILi(\d+)ELi(\d+)E(f|N6hopper4bf16E)Li(\d)E")


def variant(mangled: str) -> str | None:
    found = KERNEL.search(mangled)
    if found is None:
        return None
    rows, columns, d, cluster = found.groups()
    return f"{rows}x{columns} {'fp32' if d == 'f' else 'bf16'} x{cluster}"


def test_no_spills_and_no_serialised_wgmma():
    found = {variant(kernel.mangled): kernel for kernel in building.resources("fp8_wgrad")}
    kernels = {name: k.registers for name, k in found.items() if name}
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(VARIANTS, 168)


def test_sass_holds_the_schedule():
    code = {variant(mangled): code for mangled, code in building.instructions("fp8_wgrad").items()}
    for name, columns in VARIANTS.items():
        instructions = [i.split()[0] for i in code[name]]
        found = families(instructions)
        assert found["QGMMA"] == 4, name
        # A product of scales and a promotion for each element, a 16-byte load for the scales of four columns.
        assert found["FFMA"] == found["FMUL"] == columns // 2, name
        assert instructions.count("LDS.128") == columns // 16, name
        assert found["USETMAXREG"] == 2 and found["UTMALDG"] >= 3, name
        assert {"LDGSTS", "ARRIVES", "UTMAPF"} <= set(found), name
        assert not {"STL", "LDL"} & set(found), name
        assert ("STSM" in found and "UTMASTG" in found) == (" bf16 " in name), name
        assert any("MULTICAST" in i for i in instructions) == name.endswith("x2"), name
        # The stage of A and B is given back before the promotion reads its first scales.
        multiplied = max(n for n, i in enumerate(instructions) if i.startswith("QGMMA"))
        until_promotion = instructions[multiplied : instructions.index("LDS.128")]
        assert any(i.startswith("SYNCS.ARRIVE") for i in until_promotion), name
