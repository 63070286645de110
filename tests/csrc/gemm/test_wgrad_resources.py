"""What ptxas made of fp8_wgrad for sm_90a: registers, spills, serialisation warnings, and the instructions in the SASS."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deepseek_ops._gemm_checks import FP8_WGRAD_TILES

from .test_resources import ROOT, nvdisasm

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


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[str, Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("fp8_wgrad") / "fp8_wgrad.cubin"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    source = str(ROOT / "csrc/gemm/fp8_wgrad.cu")
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
    # 65536 registers / 384 threads; setmaxnreg moves them from there.
    assert kernels == dict.fromkeys(VARIANTS, (168, (0, 0, 0)))


def test_sass_holds_the_schedule(build):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([tool, "-c", str(build[1])], capture_output=True, text=True, check=True).stdout
    sections = {variant(s.split("\n", 1)[0]): s for s in text.split("\n\t.section\t.text.")[1:]}
    assert set(VARIANTS) <= set(sections)
    for name, columns in VARIANTS.items():
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sections[name], re.MULTILINE
        )
        families = [i.split(".")[0] for i in instructions]
        assert families.count("QGMMA") == 4, name
        # A product of scales and a promotion for each element, a 16-byte load for the scales of four columns.
        assert families.count("FFMA") == families.count("FMUL") == columns // 2, name
        assert instructions.count("LDS.128") == columns // 16, name
        assert families.count("USETMAXREG") == 2 and families.count("UTMALDG") >= 3, name
        assert {"LDGSTS", "ARRIVES", "UTMAPF"} <= set(families), name
        assert not {"STL", "LDL"} & set(families), name
        assert ("STSM" in families and "UTMASTG" in families) == (" bf16 " in name), name
        assert any("MULTICAST" in i for i in instructions) == name.endswith("x2"), name
        # The stage of A and B is given back before the promotion reads its first scales.
        multiplied = max(i for i, family in enumerate(families) if family == "QGMMA")
        until_promotion = instructions[multiplied : instructions.index("LDS.128")]
        assert any(i.startswith("SYNCS.ARRIVE") for i in until_promotion), name
