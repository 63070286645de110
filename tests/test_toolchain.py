"""Missing and old tools: the sentence names the tool and what to do."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ops import _toolchain

ROOT = Path(__file__).parents[1]


def tool(folder, name, script):
    """An executable of that name."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with an empty PATH."""
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "DEEPSEEK_OPS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_no_compiler(bare):
    assert re.search(r"no C\+\+ compiler was found .*install g\+\+ 11", _toolchain.problem("emulated"))


def test_compiler_of_cxx_is_taken_and_named(bare, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "looked for no-such-compiler" in _toolchain.problem("checked")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("unrecognized command line option '-std=c++20'", "has no C++20; install g++ 11"),
        ("probe.cpp:2:10: fatal error: source_location: No such file", "has no C++20; install g++ 11"),
        ("/usr/bin/ld: error: cannot find -lstdc++", "standard library may be missing: install libstdc++"),
        ("probe.cpp:2:10: fatal error: concepts: No such file or directory", "install libstdc++"),
    ],
)
def test_compilers_that_do_not_do(bare, said, expected):
    # Without C++20 a plain program still compiles; without a standard library it does not.
    plain = "" if "install libstdc++" in expected else 'case "$*" in *plain.cpp*) exit 0;; esac; '
    tool(bare, "c++", f'{plain}echo "{said}"; exit 1')
    assert expected in _toolchain.problem("emulated")


def test_no_cmake(bare, monkeypatch):
    monkeypatch.setattr(_toolchain, "_compiler_problem", lambda: None)
    assert _toolchain.problem("emulated") == "cmake was not found; install it: pip install cmake ninja"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Cuda compilation tools, release 12.4, V12.4.131",
            "nvcc 12.4 at .* is too old, the kernels need 12.9",
        ),
        ("command not found: cicc", "does not work: command not found"),
    ],
)
def test_nvcc_that_does_not_do(bare, monkeypatch, said, expected):
    monkeypatch.setenv("CUDACXX", tool(bare, "mynvcc", f'echo "{said}"'))
    assert re.search(expected, _toolchain.problem("cuda"))


def test_switches(bare, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_OPS_CUDA", "off")
    assert _toolchain.problem("cuda") == "DEEPSEEK_OPS_CUDA=off"
    monkeypatch.setenv("DEEPSEEK_OPS_CUDA", "maybe")
    with pytest.raises(SystemExit, match="must be auto, on or off; got 'maybe'"):
        _toolchain.problem("cuda")


def test_setup_refuses_to_go_on_without_nvcc_when_cuda_is_on(tmp_path):
    """CI sets DEEPSEEK_OPS_CUDA=on, so that a missing compiler cannot pass silently."""
    old = tool(tmp_path, "nvcc", 'echo "release 12.4, V12.4.131"')
    environment = {"PATH": "/usr/bin:/bin", "DEEPSEEK_OPS_CUDA": "on", "CUDACXX": old}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "setuptools" in done.stderr and "No module" in done.stderr:
        pytest.skip("no setuptools")
    assert done.returncode == 1 and "DEEPSEEK_OPS_CUDA=on, but nvcc 12.4" in done.stderr


def test_a_folder_stays_with_the_cmake_that_made_it(bare):
    # Found by CI: pip's CMake had made the folder and the shell's older one was then run in it.
    folder = bare / "build"

    def cmake(where, version):
        (bare / where).mkdir()
        cache = "CMAKE_COMMAND:INTERNAL=$0\n" + "".join(
            f"CMAKE_CACHE_{part}_VERSION:INTERNAL={number}\n"
            for part, number in zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
        )
        script = (
            f'if [ "$1" = --version ]; then echo "cmake version {version}"; exit; fi\n'
            f'[ "$1" = -S ] && echo "{cache}" > "$4/CMakeCache.txt"\n'
            f'echo "{version} $1" >> "{bare}/calls"'
        )
        return Path(tool(bare / where, "cmake", script))

    def configure(where, monkeypatch):
        (bare / "calls").write_text("")
        monkeypatch.setenv("PATH", str(bare / where))
        _toolchain.configure(bare, folder, ["emulated"], "")
        _toolchain.build(folder)
        return (bare / "calls").read_text().split("\n")[:-1]

    folder.mkdir()
    of_pip, _ = cmake("pip", "4.4.5"), cmake("shell", "3.25.1")
    with pytest.MonkeyPatch.context() as patch:
        assert configure("pip", patch) == ["4.4.5 -S", "4.4.5 --build"]
        (folder / "CMakeFiles").mkdir()
        assert configure("shell", patch) == ["4.4.5 -S", "4.4.5 --build"]
        assert (folder / "CMakeFiles").exists()
        of_pip.unlink()
        assert configure("shell", patch) == ["3.25.1 -S", "3.25.1 --build"]
        assert not (folder / "CMakeFiles").exists()
