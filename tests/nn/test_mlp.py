"""Fp8MLP: SwiGLU between two FP8 Linears, its input cached in FP8 and its output computed again (section 3.3.3)."""

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops.nn import Fp8Linear, Fp8MLP
from tests.nn.oracle import cached, kept_bytes, quantised, relative_rms, swiglu, turned


def make(d, inner, std=0.1):
    mlp = Fp8MLP(d, inner)
    with torch.no_grad():
        for weight in mlp.parameters():
            weight.normal_(std=std)
    return mlp


@pytest.mark.parametrize("tokens", [150, 1])
def test_forward_and_backward_are_those_of_the_report(tokens):
    torch.manual_seed(tokens)
    d, inner = 136, 72
    mlp = make(d, inner)
    x, dy = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    y = mlp(x)
    y.backward(dy)
    w1, w2 = (quantised(w.detach(), (128, 128), pow2=False) for w in mlp.parameters())
    hidden = (cached(x.detach()) @ w1.T).float()
    act = quantised(swiglu(hidden.double()).float(), (1, 128), pow2=False)
    assert relative_rms(y.detach(), act @ w2.T) < 1e-3
    hq = cached(hidden).requires_grad_()
    recomputed = swiglu(hq)
    recomputed.backward(quantised(dy, (1, 128), pow2=False) @ w2)
    d_down = quantised(dy, (128, 1), pow2=False).T @ quantised(
        recomputed.detach().float(), (128, 1), pow2=False
    )
    assert relative_rms(mlp.down.weight.grad, d_down) < 2e-3
    dh = hq.grad.float()
    assert relative_rms(x.grad, quantised(dh, (1, 128), pow2=False) @ w1) < 2e-3
    d_gate_up = quantised(dh, (128, 1), pow2=False).T @ turned(cached(x.detach()))
    assert relative_rms(mlp.gate_up.weight.grad, d_gate_up) < 2e-3


def test_what_is_kept():
    """Nothing but the two inputs in FP8: no bf16 copy, and nothing of SwiGLU's output."""
    mlp = make(256, 128)
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weights = (*mlp.gate_up.fp8_weight(), *mlp.down.fp8_weight())
    _, size = kept_bytes(lambda: mlp(x), exclude=weights)
    assert size == 64 * (256 + 2 * 128) * (1 + 4 / 128)
    with torch.no_grad():
        _, size = kept_bytes(lambda: mlp(x))
    assert size == 0


@pytest.mark.parametrize("frozen", ["gate_up", "down", "x"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    torch.manual_seed(3)
    mlp, same = make(128, 64), Fp8MLP(128, 64)
    same.load_state_dict(mlp.state_dict())
    x, dy = torch.randn(40, 128), torch.randn(40, 128)
    x_same = x.clone().requires_grad_()
    same(x_same).backward(dy)
    want = {"x": x_same.grad, "gate_up": same.gate_up.weight.grad, "down": same.down.weight.grad}
    x.requires_grad_()
    {"x": x, "gate_up": mlp.gate_up.weight, "down": mlp.down.weight}[frozen].requires_grad_(False)
    mlp(x).backward(dy)
    got = {"x": x.grad, "gate_up": mlp.gate_up.weight.grad, "down": mlp.down.weight.grad}
    assert got.pop(frozen) is None
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


def test_state_dict_is_that_of_two_linears_and_any_leading_shape():
    mlp = make(16, 8)
    assert set(mlp.state_dict()) == {"gate_up.weight", "down.weight"}
    assert isinstance(mlp.gate_up, Fp8Linear) and mlp.gate_up.weight.shape == (16, 16)
    x = torch.randn(2, 3, 16)
    y = mlp(x)
    assert torch.equal(y.view(6, 16), mlp(x.view(6, 16)))
    with torch.no_grad():
        assert torch.equal(y, mlp(x))
    empty = torch.randn(0, 16, requires_grad=True)
    mlp(empty).sum().backward()
    assert empty.grad.shape == (0, 16) and not mlp.down.weight.grad.any()
    with pytest.raises(ArgumentError, match="x: last dimension must be 16"):
        mlp(torch.randn(2, 8))
