"""Tests marked `gpu` run on backend cuda or say why not; PROOF_REHEARSAL rehearses them without a GPU (rehearsal.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deepseek_ops import _registry

from .rehearsal import rehearsal


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernel: a GPU test of what kernels do and references refuse: those do not rehearse it"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PROOF_REHEARSAL") not in ("reference", "modelled"):
        return
    left_out = [item for item in items if item.get_closest_marker("kernel")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _needs_cuda_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    backend = os.environ.get("PROOF_REHEARSAL")
    if backend:
        with rehearsal(backend):
            yield
        return
    reason = _registry.absent_reason("cuda")
    if reason:
        pytest.skip(f"backend cuda: {reason}")
    yield
