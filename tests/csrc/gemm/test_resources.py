"""What ptxas made of the FP8 GEMMs, of one matrix and of groups, for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS.

Needs nvcc, no GPU.
"""

from __future__ import annotations

import re

import pytest

from bench.kernels import families
from tests.csrc import building

TILES = ("256x128", "128x256", "128x192", "128x160", "128x128", "128x112", "128x96", "64x128", "64x256")
WAVES = {"256x128": 2, "128x256": 2}
GROUPED_TILES = ("128x256", "128x192", "128x160", "128x128", "64x128", "64x256")
SOURCES = {"fp8_gemm": TILES, "fp8_gemm_grouped": GROUPED_TILES, "fp8_gemm_masked": GROUPED_TILES}
KERNEL = re.compile(r"fp8_gemm_kernelIN\S*?ConfigILi(\d+)ELi(\d+)E(f|N6hopper4bf16E)Li(\d)E")


def variant(mangled: str) -> str | None:
    found = KERNEL.search(mangled)
    if found is None:
        return None
    rows, columns, d, cluster = found.groups()
    return f"{rows}x{columns} {'fp32' if d == 'f' else 'bf16'} x{cluster}"


def variants(source: str) -> list[str]:
    return [
        f"{tile} {d} x{cluster}" for tile in SOURCES[source] for d in ("bf16", "fp32") for cluster in (1, 2)
    ]


@pytest.fixture(scope="module", params=SOURCES)
def source(request) -> str:
    return request.param


def test_no_spills_and_no_serialised_wgmma(source):
    found = {variant(kernel.mangled): kernel for kernel in building.resources(source)}
    kernels = {name: k.registers for name, k in found.items() if name}
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(variants(source), 168)


def test_sass_holds_the_schedule(source):
    code = {variant(mangled): code for mangled, code in building.instructions(source).items()}
    for name in variants(source):
        tile, d, cluster = name.split()
        found = families(code[name])
        waves, columns = WAVES.get(tile, 1), int(tile.split("x")[1]) // (2 if tile.startswith("64x") else 1)
        assert found["QGMMA"] == 4 * waves, name
        assert found["FFMA"] == waves * (columns // (2 if tile == "128x256" else 1)) // 2, name
        assert found["USETMAXREG"] == 2, name
        assert found["UTMALDG"] >= 3, name
        assert not {"STL", "LDL"} & set(found), name
        assert ("STSM" in found and "UTMASTG" in found) == (d == "bf16"), name
        assert any("MULTICAST" in i.split()[0] for i in code[name]) == (cluster == "x2"), name
