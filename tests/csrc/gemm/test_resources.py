"""What ptxas made of fp8_gemm for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS.

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
VARIANTS = [f"{tile} {d} x{cluster}" for tile in TILES for d in ("bf16", "fp32") for cluster in (1, 2)]
KERNEL = re.compile(r"fp8_gemm_kernelIN\S*?ConfigILi(\d+)ELi(\d+)E(f|N6hopper4bf16E)Li(\d)E")


def variant(mangled: str) -> str | None:
    found = KERNEL.search(mangled)
    if found is None:
        return None
    rows, columns, d, cluster = found.groups()
    return f"{rows}x{columns} {'fp32' if d == 'f' else 'bf16'} x{cluster}"


def nvdisasm() -> str | None:
    wheel = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/nvdisasm"
    return shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[str, Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("fp8_gemm") / "fp8_gemm.cubin"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    source = str(ROOT / "csrc/gemm/fp8_gemm.cu")
    command = [nvcc, "-std=c++20", "-O3", arch, "-Xptxas=-v", "-cubin", "-o", str(cubin), source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, cubin


def test_no_spills_and_no_serialised_wgmma(build):
    log, _ = build
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
    assert sorted(kernels) == sorted(VARIANTS)
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(kernels, (168, (0, 0, 0)))


def test_sass_holds_the_schedule(build):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([tool, "-c", str(build[1])], capture_output=True, text=True, check=True).stdout
    sections = {variant(s.split("\n", 1)[0]): s for s in text.split("\n\t.section\t.text.")[1:]}
    assert set(VARIANTS) <= set(sections)
    for name in VARIANTS:
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
