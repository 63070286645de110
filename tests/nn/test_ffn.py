"""SwiGLU's backward pass: one kernel with all casts, or the same in steps; nobody can tell which."""

import pytest
import torch

from deepseek_ops import _registry
from deepseek_ops.nn import Fp8Experts, Fp8MLP, ffn


def run(kind, dtype, inner):
    torch.manual_seed(0)
    module = Fp8MLP(128, inner) if kind == "mlp" else Fp8Experts(4, 128, inner)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.1)
    x = torch.randn(37, 128).to(dtype).requires_grad_()
    if kind == "mlp":
        out, tensors = module(x), [x]
    else:
        gate = torch.rand(37, 2, requires_grad=True)
        idx = torch.rand(37, 4).topk(2, dim=1).indices
        idx[::5, 0] = -1
        out, tensors = module.routed(x, gate, idx), [x, gate]
    out.backward(torch.randn(37, 128).to(dtype))
    return [out.detach(), *(t.grad for t in (*tensors, *module.parameters()))]


@pytest.fixture
def calls(monkeypatch):
    names = []
    plain = _registry.Op._call

    def record(self, backend, args, kwargs=_registry.NO_KEYWORDS):
        names.append(self.name)
        return plain(self, backend, args, kwargs)

    monkeypatch.setattr(_registry.Op, "_call", record)
    return names


@pytest.mark.parametrize("kind", ["mlp", "experts"])
def test_fused_equals_the_steps_bit_for_bit(kind, calls, monkeypatch):
    fused = run(kind, torch.bfloat16, 128)
    assert any(name.startswith("swiglu_backward_quantize") for name in calls)
    assert not {"swiglu", "swiglu_backward", "dequantize_1x128"} & set(calls)
    del calls[:]
    monkeypatch.setattr(ffn, "fuses", lambda *_: False)
    steps = run(kind, torch.bfloat16, 128)
    assert not any(name.startswith("swiglu_backward_quantize") for name in calls)
    for a, b in zip(fused, steps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "inner"), [(torch.float32, 128), (torch.bfloat16, 72)])
def test_other_types_and_widths_go_in_steps(dtype, inner, calls):
    run("mlp", dtype, inner)
    assert {"swiglu", "swiglu_backward"} <= set(calls)
