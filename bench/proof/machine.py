"""What a proof notes about its machine, and what it builds there."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from .builds import build_all, host_compiler, nvcc
from .device import Device
from .revision import ROOT, current
from .steps import Data


def ping() -> Data:
    """Can a fresh process use the GPU?"""
    import torch

    assert float(torch.ones(8, device="cuda").sum()) == 8
    return {}


def origin() -> Data:
    """Where and when an answer of the device was recorded."""
    info = Device().info()
    return {
        "device": info.to_json() if info else None,
        "revision": current().to_json(),
        "when": Device().now(),
    }


def environment() -> Data:
    """Everything that a reader of a figure wants to know about the machine."""
    import torch

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


def build() -> Data:
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


def build_probes() -> Data:
    """Every probe, both ways. One that does not build fails its own step only."""
    problems = {name: text for name, text in build_all().items() if text}
    for text in problems.values():
        print(text)
    summary = f"{len(problems)} not built: {', '.join(problems)}" if problems else "all built"
    return {"problems": problems, "summary": summary}  # a probe without its library fails in its own step
