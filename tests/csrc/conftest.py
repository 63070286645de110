"""Kernels without their reference: what tests of kernel families share."""

from __future__ import annotations

import pytest

import deepseek_ops
from deepseek_ops._registry import absent_reason


@pytest.fixture(params=["emulated", "checked"])
def kernel_backend(request):
    """Runs a test on each backend that has kernels on this machine's CPU; the reference is what they are compared with."""
    reason = absent_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with deepseek_ops.backend(request.param):
        yield request.param
