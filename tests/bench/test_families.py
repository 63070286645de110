"""The families of the proof: every kernel that is built is measured and tested, every claim finds its evidence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.proof.device import Device
from bench.proof.families import all_claims, all_steps, families
from bench.proof.plan import order
from bench.proof.revision import ROOT

CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The step `tests` as bench.prove runs it. Without a GPU all skip; the way from step to result file is the same."""
    file = tmp_path_factory.mktemp("tests") / "result.json"
    argv = [sys.executable, "-m", "bench.proof.worker", "tests", "--result", str(file)]
    result = Device().run_process(argv, 240, cwd=ROOT)
    assert result.returncode == 0, result.output
    data = json.loads(file.read_text())
    assert data["verdict"] == "equal"
    return data["outcomes"]


def ops_with_kernels() -> dict[str, str]:
    """op -> family of csrc/kernels.json, read from the bindings: `kernel("name", ...)`."""
    found = {}
    for family in json.loads((CSRC / "kernels.json").read_text())["families"]:
        for file in family["host"]:
            for name in re.findall(r'\bkernel\("(\w+)"', (CSRC / file).read_text()):
                found[name] = family["name"]
    return found


def test_every_op_with_a_kernel_is_in_a_family() -> None:
    built = ops_with_kernels()
    assert len(built) > 50 and set(built.values()) == {
        f["name"] for f in json.loads((CSRC / "kernels.json").read_text())["families"]
    }
    proven = [op for family in families() for kernel in family.ops.values() for op in kernel]
    missing = sorted(f"{op} ({family})" for op, family in built.items() if op not in proven)
    assert not missing, (
        f"ops with a kernel that no file of bench/proof/families names in OPS: {', '.join(missing)}"
    )
    assert set(proven) <= set(built), f"no kernel has the op {sorted(set(proven) - set(built))}"


KERNELS = [(family.name, kernel) for family in families() for kernel in family.ops]


@pytest.mark.parametrize(("family", "kernel"), KERNELS, ids=[kernel for _, kernel in KERNELS])
def test_every_kernel_has_claims(family: str, kernel: str) -> None:
    """Its bits (or values, where the device's e^x stands in between), repeats, a graph, and a figure."""
    steps = {step.name: step for step in all_steps()}
    claims = [claim for claim in all_claims() if claim.subject == kernel]
    by_tests = {claim.name.rsplit(".", 1)[1] for claim in claims if claim.step == "tests"}
    assert by_tests & {"bits", "bytes", "values", "results"}, "nothing says what the kernel computes"
    assert {"repeat", "graph"} <= by_tests
    measured = {claim.step for claim in claims if claim.step != "tests"}
    assert measured and all(steps[name].kind == "benchmark" for name in measured)
    assert {steps[name].family for name in measured} == {family}, "`--family` would leave it out"


def test_every_claim_has_its_step() -> None:
    names = [claim.name for claim in all_claims()]
    assert len(set(names)) == len(names)
    steps = {step.name for step in all_steps()}
    for claim in all_claims():
        assert claim.step in steps
        assert claim.judge({})[0] is None  # no data, no verdict


def test_every_claim_on_tests_has_tests(outcomes: dict[str, str]) -> None:
    """Claims find tests by words of their names. All passed: confirmed; each failed: refuted."""
    passed = {"outcomes": dict.fromkeys(outcomes, "passed")}
    failed = {"outcomes": dict.fromkeys(outcomes, "failed")}
    for claim in all_claims():
        if claim.step == "tests":
            assert claim.judge(passed)[0] is True, f"{claim.name}: {claim.judge(passed)[1]}"
            assert claim.judge(failed)[0] is False


def test_every_test_belongs_to_a_claim(outcomes: dict[str, str]) -> None:
    """A test that fails must refute something."""
    judges = [claim.judge for claim in all_claims() if claim.step == "tests"]
    idle = [
        name for name in outcomes if all(judge({"outcomes": {name: "failed"}})[0] is None for judge in judges)
    ]
    assert idle == []


def test_gpu_tests_are_where_their_family_says() -> None:
    files = {path.stem for path in (ROOT / "tests" / "bench").glob("test_gpu_*.py")}
    expected = {f"test_gpu_{family.name}" for family in families() if family.ops} | {"test_gpu_grouped"}
    assert files == expected


def test_planning_imports_neither_torch_nor_benchmarks() -> None:
    """`bench.prove` runs where torch may be broken, and the page is written where there is none."""
    code = (
        "import sys, bench.prove; from bench.proof.families import all_claims; all_claims();"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('bench.') and m.count('.') == 1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['bench.proof', 'bench.prove']"


def test_a_new_family_is_one_file(tmp_path: Path) -> None:
    """No list names it: plan, worker and page know it because it is there."""
    code = f"""
import bench.proof.families as f
f.__path__.append({str(tmp_path)!r})
from bench import prove
from bench.proof.page import render
from bench.proof.worker import work
assert work("bench-poem", None) == {{"summary": "done"}}
assert "Every line rhymes" in render([], [])
prove.main(["--family", "poetry", "--dry-run"])
"""
    (tmp_path / "poetry.py").write_text(
        "from bench.proof.claims import tested\nfrom bench.proof.steps import benchmark\n"
        "ORDER, OPS = 99, {'poem': ('poem',)}\n"
        "STEPS = [benchmark('bench-poem', 1, 2, 'beside prose', lambda golden: {'summary': 'done'})]\n"
        "CLAIMS = [tested('poem.rhyme', 'poem', 'Every line rhymes', 'test_rhyme')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bench-poem" in done.stdout


def test_order_of_steps() -> None:
    """What emulation assumes first, then bits, then the figures that matter most."""
    names = [step.name for step in order(all_steps())]
    first = ["environment", "build", "build-probes"]
    assert names[:3] == first and names.index("tests") < names.index("ceilings") < names.index(
        "bench-fp8_gemm-large"
    )
    large = [n for n in names if n.startswith("bench-")][:2]
    assert large == ["bench-fp8_gemm-large", "bench-quantize"] and names[-2:] == [
        "micro-smem-port",
        "micro-phase",
    ]
