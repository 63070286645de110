"""The registry: gradients, fake tensors, compile, backend choice and its errors."""

import subprocess
import sys

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, BackendError, _registry


def _scale_backward(ctx, grad):
    return grad * ctx.by, None


def _save(ctx, inputs, outputs):
    ctx.by = inputs[1]


@pytest.fixture(scope="module")
def scale_op():
    """A toy op: y = by * x."""
    return _registry.declare(
        "test_registry_scale(Tensor x, float by) -> Tensor",
        reference=lambda x, by: x * by,
        fake=lambda x, by: torch.empty_like(x),
        save=_save,
        backward=_scale_backward,
    )


def test_gradient_runs_only_through_the_declaration(scale_op):
    x = torch.randn(3, requires_grad=True)
    scale_op(x, 3.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 3.0))
    assert not scale_op(x.detach(), 3.0).requires_grad
    with torch.no_grad():
        assert not scale_op(x, 3.0).requires_grad
    assert not scale_op.raw(x, 3.0).requires_grad  # the bare op never traces through the reference


def test_opcheck_and_compile(scale_op):
    torch.library.opcheck(scale_op.raw, (torch.randn(3), 2.0))
    x = torch.randn(5, requires_grad=True)
    compiled = torch.compile(lambda t: scale_op(t, 2.0).sin().sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(2 * x.detach()))


def test_a_backend_without_the_kernel_says_which_why_and_how(scale_op, monkeypatch):
    missing = _registry._not_loaded("checked", ModuleNotFoundError("No module named 'checked'"))
    monkeypatch.setattr(_registry, "absent_reason", lambda name: missing if name == "checked" else None)
    with (
        pytest.raises(BackendError, match=r"backend 'checked' is absent: not built.* reinstall deepseek_ops"),
        deepseek_ops.backend("checked"),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match=r"backend: must be one of reference.*got 'tpu'"),
        deepseek_ops.backend("tpu"),
    ):
        pass
    with deepseek_ops.backend("reference"):
        scale_op(torch.ones(1), 1.0)


def test_environment_variable_chooses_and_is_checked(scale_op, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "emulated")
    with pytest.raises(BackendError, match="cannot run 'test_registry_scale'"):
        scale_op(torch.ones(1), 1.0)
    with deepseek_ops.backend("reference"):  # the context manager wins over the environment
        scale_op(torch.ones(1), 1.0)
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "nonsense")
    with pytest.raises(ArgumentError, match="nonsense"):
        scale_op(torch.ones(1), 1.0)


def test_kernels_register_per_op(scale_op):
    calls = []
    scale_op.kernels["checked"] = lambda x, by: calls.append(by) or x * by
    token = _registry._override.set("checked")
    try:
        scale_op(torch.ones(2), 4.0)
    finally:
        _registry._override.reset(token)
        del scale_op.kernels["checked"]
    assert calls == [4.0]


def test_double_declaration_is_refused(scale_op):
    with pytest.raises(RuntimeError):
        _registry.declare(scale_op.schema, reference=lambda x, by: x, fake=lambda x, by: x)


def test_info_names_every_backend_and_reason():
    data = deepseek_ops.info()
    assert set(data["backends"]) == set(_registry.BACKENDS)
    assert data["backends"]["reference"].startswith("present")
    assert {"quantize_1x128", "fp8_gemm", "mla_attention", "route", "adamw_"} <= set(data["ops"])
    for state in data["backends"].values():
        assert state.startswith(("present", "absent: "))
    text = subprocess.run(
        [sys.executable, "-m", "deepseek_ops.info"], capture_output=True, text=True, check=True
    )
    assert "torch" in text.stdout and "reference" in text.stdout and text.stderr == ""
