"""What ptxas made of the FP8 GEMMs, of one matrix and of groups, for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS.

Needs nvcc, no GPU. The disassembler comes from the toolkit or from the nvidia-cuda-nvdisasm wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
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


def nvdisasm() -> str | None:
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/nvdisasm"
    return shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)


@pytest.fixture(scope="module", params=SOURCES)
def build(request, tmp_path_factory) -> tuple[str, str, Path]:
    """The source's name, the compiler's log, the machine code."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp(request.param) / f"{request.param}.cubin"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    source = str(ROOT / f"csrc/gemm/{request.param}.cu")
    command = [nvcc, "-std=c++20", "-O3", arch, "-Xptxas=-v", "-cubin", "-o", str(cubin), source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return request.param, result.stdout + result.stderr, cubin


def test_no_spills_and_no_serialised_wgmma(build):
    source, log, _ = build
    assert not re.search(r"C75\d\d|serializ", log), log
    kernels = {}
    for block in log.split("Compiling entry function")[1:]:
        name = variant(block)
        registers = re.search(r"Used (\d+) registers", block)
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        if name is not None:
            kernels[name] = (int(registers[1]), tuple(map(int, spills.groups())))
    assert sorted(kernels) == sorted(variants(source))
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(kernels, (168, (0, 0, 0)))


def test_sass_holds_the_schedule(build):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([tool, "-c", str(build[2])], capture_output=True, text=True, check=True).stdout
    sections = {variant(s.split("\n", 1)[0]): s for s in text.split("\n\t.section\t.text.")[1:]}
    names = variants(build[0])
    assert set(names) <= set(sections)
    for name in names:
        tile, d, cluster = name.split()
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sections[name], re.MULTILINE
        )
        families = [i.split(".")[0] for i in instructions]
        waves, columns = WAVES.get(tile, 1), int(tile.split("x")[1]) // (2 if tile.startswith("64x") else 1)
        assert families.count("QGMMA") == 4 * waves, name
        assert families.count("FFMA") == waves * (columns // (2 if tile == "128x256" else 1)) // 2, name
        assert families.count("USETMAXREG") == 2, name
        assert families.count("UTMALDG") >= 3, name
        assert not {"STL", "LDL"} & set(families), name
        assert ("STSM" in families and "UTMASTG" in families) == (d == "bf16"), name
        assert any("MULTICAST" in i for i in instructions) == (cluster == "x2"), name
