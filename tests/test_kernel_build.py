"""What ptxas makes of the kernels: no spills, no serialised wgmma, the expected instructions. Needs nvcc, no GPU."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import kernels
from deepseek_ops import _toolchain

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    try:
        return kernels.collect()
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))


def test_no_kernel_has_a_fault(report):
    assert report.problems == []
    assert report.kernels


def test_registers_fit_the_block(report):
    for kernel in report.kernels:
        assert 0 < kernel.registers <= 255, kernel.name


def test_every_kernel_is_disassembled(report):
    if not report.disassembled:
        pytest.skip("no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    assert [k.name for k in report.kernels if k.instructions.total() < 10] == []


# --- reading what the tools say -----------------------------------------------------------------------------------

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.
ptxas info    : Compiling entry function '_Z4fast1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z4fast1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90a'
ptxas info    : Function properties for _Z4slowPf
    48 bytes stack frame, 100 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


def test_ptxas_log_is_read():
    fast, slow = kernels.parse_log(LOG, "x.cu")
    assert (fast.registers, fast.barriers, fast.shared_bytes, fast.spill_bytes) == (168, 3, 1024, 0)
    assert (slow.registers, slow.stack_bytes, slow.spill_bytes) == (255, 48, 220)


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("void toy::(anonymous namespace)::axpy_kernel(toy::AxpyArguments)", "axpy_kernel"),
        (
            "void g::gemm_kernel<g::Config<(int)128, 256, hopper::bf16, (unsigned int)2> >(hopper::TensorMap, g::Params)",
            "gemm_kernel<Config<128, 256, bf16, 2>>",
        ),
        ("void k<(bool)1, float>(k_params<int>)", "k<1, float>"),
    ],
)
def test_names_are_short(full, short):
    assert kernels.short_name(full) == short


def test_instruction_rules():
    rules = [{"kernel": "gemm", "has": ["QGMMA"], "lacks": ["LDL"]}]

    def problems(name, **counts):
        kernel = kernels.Kernel("x.cu", name, name, instructions=Counter(counts))
        return kernels.check_instructions([kernel], rules)

    assert problems("gemm<1>", QGMMA=4) == []
    assert problems("gemm", LDL=1) == ["gemm: has no QGMMA", "gemm: has LDL"]
    assert problems("gemm_other", QGMMA=4) == [
        "gemm_other: csrc/kernels.json does not say which instructions it should have"
    ]


# --- the gates of the build -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("ptxas info    : Used 8 registers", 0),
        ("ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored", 1),
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            1,
        ),
    ],
)
def test_serialised_kernels_do_not_build(tmp_path, said, status):
    object_file, log = tmp_path / "x.o", tmp_path / "x.o.log"
    command = ["sh", "-c", f'echo "{said}"; touch "$1"', "compiler", str(object_file)]
    done = subprocess.run(
        ["sh", str(ROOT / "csrc/compile_with_log.sh"), str(log), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status and said in log.read_text()
    assert object_file.exists() == (status == 0)
    assert ("C75xx" in done.stderr) == (status == 1)


def test_spills_do_not_build(tmp_path):
    """The flags of CMakeLists.txt refuse a kernel that uses local memory."""
    if _toolchain.problem("cuda"):
        pytest.skip(str(_toolchain.problem("cuda")))
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void spill(float* p, int n) {\n  float local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[i] = p[i];\n"
        "  for (int i = 0; i < n; ++i) local[(i * 7) % 64] += p[i];\n"
        "  for (int i = 0; i < 64; ++i) p[i] = local[i];\n}\n"
    )
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = [
        word for line in text.splitlines() if "set(strict" in line for word in line.strip(" )").split()[1:]
    ]
    gencode = "-gencode=arch=compute_90a,code=sm_90a"
    assert flags and gencode in text
    command = [
        str(_toolchain.find_nvcc()),
        gencode,
        *flags,
        "-c",
        str(source),
        "-o",
        str(tmp_path / "spill.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Local memory used" in done.stdout + done.stderr


def test_command_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_toolchain, "find_nvcc", lambda: None)
    monkeypatch.setenv("DEEPSEEK_OPS_CUDA", "auto")
    assert kernels.main([]) == 2
    assert "no nvcc was found" in capsys.readouterr().err


def test_table_of_the_toy():
    if _toolchain.problem("cuda"):
        pytest.skip(str(_toolchain.problem("cuda")))
    command = [sys.executable, "-m", "bench.kernels", "--list", "tests/csrc/toy/kernels.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "reverse_kernel" in done.stdout
    *_, last = done.stdout.splitlines()
    assert last.startswith("2 instantiations of 2 kernels in ") and last.endswith(" 0 faults")


def test_table_by_family_and_totals(tmp_path):
    found = [
        kernels.Kernel("a.cu", "m", "wide<1>", registers=40, family="one"),
        kernels.Kernel("b.cu", "m", "other", spill_bytes=8, family="two"),
        kernels.Kernel("a.cu", "m", "wide<2>", registers=50, family="one"),
    ]
    lines = kernels.table(found).splitlines()
    assert [line.split()[0] for line in lines if line] == ["one", "wide<1>", "wide<2>", "two", "other"]
    objects = tmp_path / "kernels"
    (tmp_path / ".ninja_log").write_text(
        "# ninja log v5\n0\t9000\t1\tkernels/a.o\tx\n5\t1505\t1\tkernels/a.o\tx\n7\t9007\t1\ttest/b.o\tx\n"
    )
    seconds = kernels.compile_seconds(objects)
    assert seconds == {"a": 1.5}  # of the last time, and of this list only
    report = kernels.Report(found, ["p"], [], True, {"a.cu": 1.5})
    assert kernels.totals(report) == (
        "3 instantiations of 2 kernels in 2 files, 8 bytes of spills, compile time unknown, 1 faults"
    )
    report.seconds["b.cu"] = 10.0
    assert ", 12 s of compiling, " in kernels.totals(report)
    assert kernels.compile_seconds(tmp_path / "nothing" / "here") == {}
