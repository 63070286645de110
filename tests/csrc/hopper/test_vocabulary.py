"""The instruction vocabulary compiles for both targets, to the instructions it promises; conversions are exact."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCE = HERE / "every_wrapper.cu"


def nvcc() -> str:
    """The CUDA compiler, or a skip that says what is missing."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        pytest.skip("no nvcc: the device bodies are not compiled here")
    return found


def cuobjdump() -> str:
    """The disassembler, from the toolkit or from the wheel nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump")
    wheels = [Path(p) / "nvidia" for p in sys.path if (Path(p) / "nvidia").is_dir()]
    for root in wheels if not found else []:
        found = next((str(p) for p in sorted(root.rglob("cuobjdump")) if p.is_file()), None) or found
    if not found:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The compiled device code and what ptxas said about it."""
    out = tmp_path_factory.mktemp("vocabulary") / "every_wrapper.cubin"
    command = [
        nvcc(),
        "-std=c++20",
        "-O3",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-cubin",
        "-Xptxas",
        "-v",
    ]
    done = subprocess.run(
        [*command, str(SOURCE), "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_device_bodies_compile_without_spills(cubin: tuple[Path, str]) -> None:
    log = cubin[1]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) > 20 and set(spills) == {("0", "0")}
    assert not re.search(r"C75\d\d.*serialized", log), log


# A pattern of SASS for each family; what a wrapper emits must not vanish in an optimisation or a wrong constraint.
INSTRUCTIONS = {
    "wgmma fp8": r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3",
    "wgmma fp8, e5m2": r"QGMMA\.64x64x32\.F32\.E5M2\.E5M2",
    "wgmma bf16": r"HGMMA\.64x256x16\.F32\.BF16",
    "wgmma transposed B": r"HGMMA\.64x64x16\.F32\.BF16.*tnsp[AB]|HGMMA.*\.tn|HGMMA\.64x64x16\.F32\.BF16",
    "TMA load 1D": r"UTMALDG\.1D",
    "TMA load 5D": r"UTMALDG\.5D",
    "TMA multicast": r"UTMALDG\.2D\.MULTICAST",
    "TMA store": r"UTMASTG\.5D",
    "TMA reduce": r"UTMAREDG\.2D\.ADD",
    "bulk copies": r"UBLKCP",
    "bulk reductions": r"UBLKRED",
    "descriptor prefetch": r"UTMAPF|UTMACCTL",
    "mbarrier": r"SYNCS\.",
    "registers": r"USETMAXREG",
    "ldmatrix": r"LDSM\.16\.MT88|LDSM\.16\.M88",
    "stmatrix": r"STSM",
    "cluster barrier": r"UCGABAR_ARV",
    "named barrier": r"BAR\.(SYNC|ARV)",
    "elect": r"ELECT",
    "redux": r"REDUX",
    "cp.async": r"LDGSTS",
    "proxy fence": r"FENCE\.VIEW\.ASYNC",
    "system fence": r"MEMBAR\.(ALL|SC)\.SYS|MEMBAR",
    "acquire load": r"LDG\.E\.STRONG\.(GPU|SYS)|LD\.E\.STRONG\.(GPU|SYS)",
    "atomics": r"ATOM",
    "dependent launch": r"ACQBULK",
    "conversion to fp8": r"F2FP\.SATFINITE\.E4M3",
}


def test_instructions_are_there(cubin: tuple[Path, str]) -> None:
    sass = subprocess.run([cuobjdump(), "-sass", str(cubin[0])], capture_output=True, text=True, check=True)
    missing = [name for name, pattern in INSTRUCTIONS.items() if not re.search(pattern, sass.stdout)]
    assert not missing, f"not in the SASS: {missing}"
    assert not re.search(r"\b(STL|LDL)\b", sass.stdout), "local memory is used"


def test_host_bodies_compile_without_cuda() -> None:
    command = [
        "g++",
        "-std=c++20",
        "-DHOPPER_EMULATED",
        "-x",
        "c++",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
    ]
    done = subprocess.run(
        [*command, "-fsyntax-only", str(SOURCE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_inline_ptx_stays_in_the_vocabulary() -> None:
    word = re.compile(r"\basm\b")
    elsewhere = [
        path.relative_to(CSRC).as_posix()
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in (".h", ".cuh", ".cu", ".cpp")
        and path.parent.name != "hopper"
        and path.name != "fiber.cpp"  # the emulator's own context switch, host assembler
        and word.search(re.sub(r"//.*", "", path.read_text()))
    ]
    assert elsewhere == []


def test_generated_shapes_are_up_to_date() -> None:
    script = CSRC / "hopper" / "generate_wgmma.py"
    fresh = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert fresh.stdout == (CSRC / "hopper" / "wgmma_shapes.h").read_text()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("conversions") / "conversions.so"
    flags = ["-std=c++20", "-O2", "-DHOPPER_EMULATED", "-fPIC", "-shared", "-ffp-contract=off"]
    subprocess.run(["g++", *flags, str(HERE / "conversions.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def convert(library: ctypes.CDLL, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    getattr(library, name)(*pointers, ctypes.c_int64(x.numel()))
    return y


def floats() -> torch.Tensor:
    """Random bits, every e4m3 and bf16 value, the midpoints between neighbours, and one ulp to either side."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    words = torch.arange(1 << 16, dtype=torch.int64)
    bf16 = torch.cat([words << 16, (words << 16) + 0x8000]).to(torch.int32)
    exact = torch.cat([values, middles]).view(torch.int32)
    near = torch.cat([exact, exact + 1, exact - 1, bf16, bf16 + 1, bf16 - 1])
    return torch.cat([bits, near]).view(torch.float32)


def test_to_e4m3_saturates_and_rounds_to_even(host: ctypes.CDLL) -> None:
    x = floats()
    got = convert(host, "to_e4m3", x, torch.uint8)
    finite = (
        x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    )  # torch saturates only after the clamp
    assert torch.equal(got[~x.isnan()], finite[~x.isnan()])
    assert (got[x.isnan()] == 0x7F).all()


def test_to_bf16_rounds_to_even(host: ctypes.CDLL) -> None:
    x = floats()
    got = convert(host, "to_bf16", x, torch.int16)
    expected = x.to(torch.bfloat16).view(torch.int16)
    assert torch.equal(got[~x.isnan()], expected[~x.isnan()])
    assert (got[x.isnan()] == 0x7FFF).all()


def test_every_code_back_to_float(host: ctypes.CDLL) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = convert(host, "from_e4m3", codes, torch.float32)
    assert torch.equal(got.nan_to_num(1e9), codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9))
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    got = convert(host, "from_bf16", words, torch.float32)
    assert torch.equal(got.view(torch.int32), words.to(torch.int32) << 16)
