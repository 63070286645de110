"""What ptxas made of bf16_gemm for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS.

Needs nvcc, no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .test_bf16_gemm import MAJORS, TILES
from .test_fp8_gemm import ROOT
from .test_resources import nvdisasm

KERNEL = re.compile(r"bf16_gemm_kernelIN\S*?ConfigILi(\d+)ELi(\d+)ELN6hopper5MajorE(\d)ELS\d_(\d)ELi(\d)E")
VARIANTS = [f"{m}x{n} {majors} x{cluster}" for m, n in TILES for majors in MAJORS for cluster in (1, 2)]


def variant(mangled: str) -> str | None:
    found = KERNEL.search(mangled)
    if found is None:
        return None
    rows, columns, a, b, cluster = found.groups()
    return f"{rows}x{columns} {'km'[int(a)]}{'km'[int(b)]} x{cluster}"


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[str, Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("bf16_gemm") / "bf16_gemm.cubin"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    source = str(ROOT / "csrc/gemm/bf16_gemm.cu")
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
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        if name is not None:
            kernels[name] = (int(registers[1]), tuple(map(int, frame.groups())))
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
        tile, majors, cluster = name.split()
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sections[name], re.MULTILINE
        )
        families = Counter(i.split(".")[0] for i in instructions)
        waves = 2 if tile == "256x128" else 1
        # Four steps of K to a slice, back to back; one wait that leaves the newest slice in flight, one for all.
        assert families["HGMMA"] == 4 * waves, name
        assert families["WARPGROUP"] >= 3 and families["USETMAXREG"] == 2, name
        assert families["UTMALDG"] >= 2 and families["UTMASTG"] >= 1 and families["STSM"] >= 4, name
        assert not {"STL", "LDL", "HMMA"} & set(families), name
        assert any("MULTICAST" in i for i in instructions) == (cluster == "x2"), name
        assert ("tnspA" in sections[name]) == (majors[0] == "m"), name
        assert ("tnspB" in sections[name]) == (majors[1] == "m"), name
