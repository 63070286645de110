"""What the tests' own builder promises: every object once, what a header reaches, and nothing broken after a kill."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek_ops import _toolchain
from tests.csrc import building


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Two sources of one stem; the first includes a header."""
    for name, text in {
        "value.h": "inline int value() { return 1; }\n",
        "x.cpp": '#include "value.h"\nextern "C" int first() { return value(); }\n',
        "x.cu": 'extern "C" int second() { return 2; }\n',
    }.items():
        (tmp_path / name).write_text(text)
    return [tmp_path / "x.cpp", tmp_path / "x.cu"]


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """A slow compiler; the sources that it was given, in order."""
    real = _toolchain.find_compiler()
    if real is None:
        pytest.skip("no C++ compiler")
    log, script = tmp_path / "log", tmp_path / "slow"
    log.touch()
    script.write_text(
        "#!/bin/sh\nfor word; do\n"
        f'  if [ "$previous" = -c ]; then echo "${{word##*/}}" >>{log}; sleep 0.3; fi\n  previous=$word\ndone\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    return lambda: log.read_text().split()


def test_an_object_is_made_once_and_again_when_what_it_includes_changes(sources, compiles):
    def build():
        return building.library("twice", sources, runtime=False)

    library = build()
    assert (library.first(), library.second()) == (1, 2)
    assert sorted(compiles()) == ["x.cpp", "x.cu"]
    assert build()._name == library._name and len(compiles()) == 2
    sources[0].with_name("value.h").write_text("inline int value() { return 3; }\n")
    assert build().first() == 3
    assert compiles()[2:] == ["x.cpp"]
    os.utime(sources[1])  # newer, not other
    build()
    assert len(compiles()) == 3


def test_workers_share_the_work(sources, compiles):
    with ThreadPoolExecutor(3) as pool:
        names = {
            library._name
            for library in pool.map(lambda _: building.library("shared", sources, runtime=False), range(3))
        }
    assert len(names) == 1 and sorted(compiles()) == ["x.cpp", "x.cu"]


def test_a_killed_worker_leaves_nothing_broken(sources, compiles):
    worker = os.fork()
    if worker == 0:
        building.objects(sources[:1])
        os._exit(0)
    while not compiles():
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert building.library("killed", sources, runtime=False).first() == 1


def test_what_the_compiler_says_is_the_failure(sources):
    sources[0].write_text("int first() { return nothing; }\n")
    with pytest.raises(building.BuildError, match="nothing"):
        building.objects(sources)
    sources[0].write_text('extern "C" int first() { return 4; }\n')
    assert building.library("mended", sources, runtime=False).first() == 4


def test_what_the_package_has_compiled_is_not_compiled_again():
    sources = [building.EMULATOR[0], building.CSRC / "quantize/quantize_rows.cu"]
    package_has(sources)
    assert all(path.is_relative_to(building.PACKAGE) for path in building.objects(sources))


def package_has(sources: list[Path]) -> None:
    """Lets the package's build make these objects where it has not: in a checkout that nobody has installed."""
    if reason := _toolchain.problem("emulated"):
        pytest.skip(reason)
    pybind11 = pytest.importorskip("pybind11")
    with _toolchain.locked(building.PACKAGE):
        if not (building.PACKAGE / "CMakeCache.txt").exists():
            targets = [target for target in _toolchain.TARGETS if not _toolchain.problem(target)]
            _toolchain.configure(building.ROOT, building.PACKAGE, targets, pybind11.get_cmake_dir())
        if not (building.PACKAGE / "build.ninja").exists():
            pytest.skip("no Ninja: Make builds the package here, and cannot be asked for single objects")
        made = [building._package_object(building._unit(source, building.PLAIN, ())) for source in sources]
        assert _toolchain.refresh(
            building.PACKAGE, [str(path.relative_to(building.PACKAGE)) for path in made]
        )
