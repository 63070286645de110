"""What ptxas made of fp8_gemm_decode for sm_90a: registers, spills, and the instructions in the SASS. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.csrc.gemm.test_resources import ROOT, nvdisasm

THREADS, TOKENS = 288, (8, 16, 32, 64)
BLOCKS = {(tokens, cluster): 1 if cluster or tokens == 64 else 2 for tokens in TOKENS for cluster in (0, 1)}
KERNEL = re.compile(r"fp8_decode_kernelIN\S*?ConfigILi(\d+)ELb([01])E")


def variant(text: str) -> tuple[int, int] | None:
    found = KERNEL.search(text)
    return found and (int(found[1]), int(found[2]))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("fp8_decode") / "fp8_decode.cubin"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    source = str(ROOT / "csrc/gemm/fp8_decode.cu")
    command = [nvcc, "-std=c++20", "-O3", arch, "-Xptxas=-v", "-cubin", "-o", str(cubin), source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr, cubin


def test_no_spills_and_the_blocks_fit_by_registers(build):
    log, _ = build
    assert not re.search(r"C75\d\d|serializ", log), log
    found = {}
    for block in log.split("Compiling entry function")[1:]:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in block, block
        found[variant(block)] = int(re.search(r"Used (\d+) registers", block)[1])
    assert found.keys() == BLOCKS.keys()
    for key, registers in found.items():
        assert -(-registers // 8) * 8 * THREADS * BLOCKS[key] <= 65536, key


def test_sass_holds_the_schedule(build):
    tool = nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    text = subprocess.run([tool, "-c", str(build[1])], capture_output=True, text=True, check=True).stdout
    sections = {variant(s.split("\n", 1)[0]): s for s in text.split("\n\t.section\t.text.")[1:]}
    for (tokens, cluster), blocks in BLOCKS.items():
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)",
            sections[tokens, cluster],
            re.MULTILINE,
        )
        families = [i.split(".")[0] for i in instructions]
        unrolled, rest = divmod(families.count("QGMMA"), 4)  # the loop over slices may be unrolled
        assert unrolled > 0 and rest == 0 and blocks
        assert families.count("FFMA") == unrolled * tokens // 2
        assert families.count("UTMALDG") >= 3
        assert not {"STL", "LDL", "RED", "ATOM", "ATOMG"} & set(families)
        # Pieces travel by bulk copies: no barrier of GPU scope but those of the cluster at the start and at the end.
        assert ("UBLKCP" in families) == bool(cluster)
        assert instructions.count("MEMBAR.ALL.GPU") == 2 * cluster
