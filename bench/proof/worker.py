"""What runs inside the process of one step: `python -m bench.proof.worker STEP --result FILE`.

Only `bench.prove` calls this. The result is one JSON object; `summary` in it is shown in the table, `verdict`
("equal" or "differs") decides whether the step counts as a disagreement.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .device import Device
from .revision import ROOT, current


def ping() -> dict[str, Any]:
    """Can a fresh process use the GPU?"""
    import torch

    assert float(torch.ones(8, device="cuda").sum()) == 8
    return {}


def environment() -> dict[str, Any]:
    """Everything that a reader of a figure wants to know about the machine."""
    import torch

    from .builds import host_compiler, nvcc

    info = Device().info()
    properties = torch.cuda.get_device_properties(0)
    versions = {}
    for package in ("numpy", "triton", "deep_gemm", "pynvml"):
        versions[package] = importlib.util.find_spec(package) is not None
    return {
        "device": info.to_json() if info else None,
        "clocks": Device().clocks(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "nvcc": _version(nvcc()),
        "cxx": _version(host_compiler()),
        "present": versions,
        "nvidia_smi": _output(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"])[:6000],
        "summary": f"{properties.name}, driver {info.driver if info else '?'}, torch {torch.__version__}",
    }


def _version(compiler: str | None) -> str | None:
    if compiler is None:
        return None
    lines = _output([compiler, "--version"]).splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else None)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def build() -> dict[str, Any]:
    """The native module `cuda`: kept when it is newer than its sources, else built in place, offline."""
    built = _native()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += [ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    newest = max(path.stat().st_mtime for path in sources)
    if built is not None and built.stat().st_mtime >= newest:
        return {"built": False, "module": built.name, "summary": f"{built.name} is up to date"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "-v",
        "-e",
        str(ROOT),
    ]
    environment = {**os.environ, "DEEPSEEK_OPS_CUDA": "on", "MAX_JOBS": str(os.cpu_count() or 2)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-6000:], done.stderr[-3000:])
    if done.returncode != 0:  # an image without pip or a wheel tool still has setuptools
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout[-6000:], done.stderr[-3000:])
    built = _native()
    if done.returncode != 0 or built is None:
        raise SystemExit(f"the native module was not built: {' '.join(command)} ended with {done.returncode}")
    code = "import deepseek_ops._native.cuda as m, json; print(json.dumps(m.build_info()))"
    check = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if check.returncode != 0:
        raise SystemExit(
            f"the native module was built but does not load: {check.stderr.strip().splitlines()[-1:]}"
        )
    return {
        "built": True,
        "module": built.name,
        "info": json.loads(check.stdout),
        "summary": f"built {built.name}",
    }


def _native() -> Path | None:
    found = sorted(
        (ROOT / "deepseek_ops" / "_native").glob("cuda*.so"), key=lambda path: path.stat().st_mtime
    )
    return found[-1] if found else None


def build_probes() -> dict[str, Any]:
    """Every probe, both ways. One that does not build fails its own step only."""
    from .builds import build_all

    problems = {name: text for name, text in build_all().items() if text}
    for text in problems.values():
        print(text)
    summary = f"{len(problems)} not built: {', '.join(problems)}" if problems else "all built"
    return {"problems": problems, "summary": summary}  # a probe without its library fails in its own step


def probe(name: str, golden: Path) -> dict[str, Any]:
    """One probe."""
    from .probes import prove

    info = Device().info()
    origin = {
        "device": info.to_json() if info else None,
        "revision": current().to_json(),
        "when": Device().now(),
    }
    return prove(name, golden, origin)


def tests() -> dict[str, Any]:
    """pytest -m gpu; outcomes by test."""
    files = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    if not files:
        return {"outcomes": {}, "verdict": "equal", "summary": "no test is marked gpu"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            f"--junitxml={file}",
            *files,
        ]
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        print(done.stdout[-8000:])
        if done.returncode not in (0, 1, 5) or not file.exists():
            raise SystemExit(f"pytest ended with {done.returncode}")
        outcomes = read_junit(file)
    counts = {state: list(outcomes.values()).count(state) for state in ("passed", "failed", "skipped")}
    return {
        "outcomes": outcomes,
        "verdict": "differs" if counts["failed"] else "equal",
        "tail": done.stdout[-4000:] if counts["failed"] else "",
        "summary": ", ".join(f"{count} {state}" for state, count in counts.items() if count),
    }


def read_junit(file: Path) -> dict[str, str]:
    """{"module::name": "passed" | "failed" | "skipped"} of a junit file that our own pytest has just written."""
    outcomes = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        bad = case.find("failure") is not None or case.find("error") is not None
        outcomes[name] = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
    return outcomes


def work(step: str, golden: Path) -> dict[str, Any]:
    """The data of one step; raises when it cannot be done."""
    if step == "ping":
        return ping()
    if step == "environment":
        return environment()
    if step == "build":
        return build()
    if step == "build-probes":
        return build_probes()
    if step == "tests":
        return tests()
    if step.startswith("probe-"):
        return probe(step.removeprefix("probe-"), golden)
    if step.startswith("micro-"):
        from . import micro

        return micro.MEASUREMENTS[step.removeprefix("micro-")]()
    from . import benchmarks

    if step == "vendor-partials":
        return benchmarks.vendor_partials()
    if step == "ceilings":
        return benchmarks.ceilings()
    if step == "bench-quantize":
        return benchmarks.bench_quantize()
    if step.startswith("bench-memory-bound-"):
        return benchmarks.bench_memory_bound(step.removeprefix("bench-memory-bound-"))
    if step.startswith("bench-fp8_gemm-"):
        return benchmarks.bench_gemm(step.removeprefix("bench-fp8_gemm-"))
    raise SystemExit(f"no such step: {step!r}")


def _die_with_parent() -> None:
    """When bench.prove is killed outright, nothing may go on holding the GPU (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    """Do one step and write its result."""
    parser = argparse.ArgumentParser(prog="python -m bench.proof.worker")
    parser.add_argument("step")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--seconds", type=int, default=600, help="when this process will be killed")
    options = parser.parse_args(arguments)
    _die_with_parent()
    data = work(options.step, options.golden)
    if options.result:
        options.result.write_text(json.dumps(data))


if __name__ == "__main__":
    main()
