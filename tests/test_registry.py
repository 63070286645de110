"""The registry: gradients, fake tensors, compile, backend choice and its errors."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_the_first_backend_that_can_runs_the_op(scale_op, monkeypatch):
    """Some ops have no kernel, and no kernel has every dtype."""
    monkeypatch.setattr(_registry, "absent_reason", lambda name: "not built" if name == "cuda" else None)
    calls = []
    with deepseek_ops.backend("checked", "modelled", "reference"):
        scale_op(torch.ones(2), 4.0)  # no kernel: modelled, which every op has
        monkeypatch.setitem(scale_op.kernels, "checked", lambda x, by: calls.append(x.dtype) or x * by)
        scale_op(torch.ones(2), 4.0)
        scale_op(torch.ones(2, dtype=torch.float64), 4.0)  # kernels that exist do not serve fp64
    assert calls == [torch.float32]
    with (
        deepseek_ops.backend("checked", "emulated"),
        pytest.raises(BackendError, match=r"'checked' cannot run .*dtypes; backend 'emulated' .*no kernel"),
    ):
        scale_op(torch.ones(2, dtype=torch.float64), 4.0)
    with (
        pytest.raises(BackendError, match="'cuda' is absent: not built"),
        deepseek_ops.backend("reference", "cuda"),
    ):
        pass
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "emulated, reference")
    assert _registry.wanted_backends() == ("emulated", "reference")
    scale_op(torch.ones(2), 4.0)
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "cuda,reference")
    with pytest.raises(BackendError, match=r"'cuda' cannot run .*not built"):
        scale_op(torch.ones(2), 4.0)
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "emulated,,reference")
    with pytest.raises(ArgumentError, match="got ''"):
        scale_op(torch.ones(2), 4.0)


def test_kernels_register_per_op(scale_op):
    calls = []
    scale_op.kernels["checked"] = lambda x, by: calls.append(by) or x * by
    token = _registry._override.set(("checked",))
    try:
        scale_op(torch.ones(2), 4.0)
    finally:
        _registry._override.reset(token)
        del scale_op.kernels["checked"]
    assert calls == [4.0]


@pytest.fixture
def dispatched(scale_op, monkeypatch):
    """Calls of the toy op that went through torch's dispatcher."""
    calls, raw = [], scale_op.raw

    def spy(*args):
        calls.append(args)
        return raw(*args)

    monkeypatch.setattr(scale_op, "raw", spy)
    return calls


def test_plain_cpu_tensors_skip_the_dispatcher(scale_op, dispatched):
    x = torch.randn(3)
    want = torch.ops.deepseek_ops.test_registry_scale(x, 2.0)
    with torch.inference_mode():
        made_in_inference_mode = torch.ones(2)
        assert torch.equal(scale_op(x, 2.0), want)
    scale_op(made_in_inference_mode, 2.0)
    assert torch.equal(scale_op(x, 2.0), want)
    with torch.no_grad():
        assert torch.equal(scale_op(torch.nn.Parameter(x), 2.0), want)
    leaf = x.clone().requires_grad_()
    scale_op(leaf, 2.0).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((3,), 2.0))
    assert not dispatched


def test_in_place_kernels_called_directly_still_bump_the_version_counter():
    bias, counts = torch.zeros(2), torch.tensor([1, 3])
    version = bias._version
    deepseek_ops.moe.update_bias_(bias, counts, speed=0.5)
    assert bias._version > version and bias.tolist() == [0.5, -0.5]


class _OnlyTorchFunction(torch.Tensor):
    pass


class _SeesFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _SeesOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_wants_to_see_an_op_sees_it(scale_op, dispatched):
    x = torch.randn(3)
    with _SeesOps() as mode:
        scale_op(x, 2.0)
    assert mode.ops[0].startswith("deepseek_ops.test_registry_scale")
    with _SeesFunctions():
        scale_op(x, 2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scale_op(x, 2.0)
    assert "deepseek_ops::test_registry_scale" in {event.key for event in profile.key_averages()}
    scale_op(x.as_subclass(_OnlyTorchFunction), 2.0)
    assert scale_op(torch.empty(3, device="meta"), 2.0).device.type == "meta"
    with FakeTensorMode():
        assert isinstance(scale_op(torch.empty(3), 2.0), FakeTensor)
    assert len(dispatched) == 6
    traced = torch.jit.trace(lambda t: scale_op(t, 2.0), (x,), check_trace=False)
    assert "test_registry_scale" in str(traced.graph)
    assert len(dispatched) == 7


def test_unusual_tensors_take_the_dispatcher(scale_op, dispatched):
    with pytest.raises(NotImplementedError):
        scale_op(torch.eye(2).to_sparse(), 2.0)
    rows = torch.randn(2, 3)
    assert torch.equal(torch.func.vmap(lambda t: scale_op(t, 2.0))(rows), 2 * rows)
    negated = torch.imag(torch.ones(2, dtype=torch.complex64).conj())
    assert negated.is_neg()
    scale_op(negated, 2.0)
    assert len(dispatched) == 3


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
