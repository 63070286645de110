"""Shared test set-up: deterministic hypothesis profiles, one thread per worker on small machines, and backends.

A test that takes `backend_name` runs once on each of reference, emulated and checked, inside
`deepseek_ops.backend(...)`; where a backend is absent it is skipped with the reason. Its body need not know:

    def test_scale(backend_name):
        assert ops.scale(x, 2) == ...

On emulated and checked every kernel runs with a seed made from the test's name. `@pytest.mark.emulated(seeds=8,
asynchrony="lazy", schedule="pct")` asks for several seeds and sets options of `deepseek_ops.emulation`. A failure
prints the seed; `pytest --emu-seed N <test>` replays it. Hypothesis tests draw fewer examples there (EXAMPLES).
"""

import contextlib
import os
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

import deepseek_ops
from deepseek_ops import _registry

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, max_examples=40, **_COMMON)
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("nightly", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)

BACKENDS = ("reference", "emulated", "checked")
EXAMPLES = {"reference": 1.0, "emulated": 0.25, "checked": 0.1}  # share of the profile's max_examples


def pytest_addoption(parser):
    parser.addoption("--emu-seed", type=int, help="seed of the emulator, for every test that runs on it")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "emulated(seeds=1, **options): how a test with backend_name runs in the emulator (tests/conftest.py)",
    )


def pytest_generate_tests(metafunc):
    """One run of a test with `backend_name` per backend, and per seed in the emulator."""
    if "backend_name" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("emulated")
    seeds = (
        1
        if marker is None or metafunc.config.getoption("--emu-seed") is not None
        else marker.kwargs.get("seeds", 1)
    )
    runs = []
    for name in BACKENDS:
        reason = _registry.absent_reason(name)
        skip = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else []
        for i in range(1 if name == "reference" else seeds):
            runs.append(pytest.param(name, id=name if i == 0 else f"{name}-{i}", marks=skip))
    metafunc.parametrize("backend_name", runs)


def _backend_of(item):
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend_name") if callspec else None


@contextlib.contextmanager
def _examples_for(item, name):
    """A hypothesis test draws as many examples as its backend has time for."""
    given = getattr(item.obj, "_hypothesis_internal_use_settings", None)  # as hypothesis' own plugin reads it
    if given is None:
        yield
        return
    count = max(1, int(given.max_examples * EXAMPLES[name]))
    item.obj._hypothesis_internal_use_settings = settings(given, max_examples=count)
    try:
        yield
    finally:
        item.obj._hypothesis_internal_use_settings = given


def _emulator_seed(item):
    given = item.config.getoption("--emu-seed")
    return zlib.crc32(item.nodeid.encode()) if given is None else given


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    name = _backend_of(item)
    if name is None:
        return (yield)
    marker = item.get_closest_marker("emulated")
    options = {key: value for key, value in marker.kwargs.items() if key != "seeds"} if marker else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(deepseek_ops.backend(name))
        stack.enter_context(deepseek_ops.emulation(**{"seed": _emulator_seed(item), **options}))
        stack.enter_context(_examples_for(item, name))
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when == "call" and _backend_of(item) in ("emulated", "checked"):
        seed = _emulator_seed(item)
        report.sections.append(("emulator", f"seed {seed}; replay: pytest --emu-seed {seed} '{item.nodeid}'"))
    return report
