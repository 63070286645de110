"""gate_logits: the gate's product in FP32 from bf16 operands, its gradient near FP32 in both directions."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_ops import ArgumentError
from deepseek_ops.nn import gate_logits
from tests.nn.oracle import kept_bytes, relative_rms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(dtype):
    torch.manual_seed(0)
    x = torch.randn(50, 96).to(dtype).requires_grad_()
    weight = torch.randn(16, 96).to(dtype).requires_grad_()
    d = torch.randn(50, 16)
    logits = gate_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x.float(), weight.float()))
    logits.backward(d)
    assert x.grad.dtype == weight.grad.dtype == dtype
    want_x, want_w = d.double() @ weight.double(), d.double().T @ x.double()
    bound = 2e-3 if dtype == torch.bfloat16 else 1e-6  # the one rounding to the operands' dtype
    assert relative_rms(x.grad, want_x) < bound and relative_rms(weight.grad, want_w) < bound
    if (
        dtype == torch.bfloat16
    ):  # and that is nearly the correctly rounded result: d itself was not cut to bf16
        for got, want in ((x.grad, want_x), (weight.grad, want_w)):
            assert (got == want.float().bfloat16()).double().mean() > 0.99
        cut = (d.bfloat16().float() @ weight.float()).bfloat16()
        assert (cut == want_x.float().bfloat16()).double().mean() < 0.9


def test_what_is_kept():
    x = torch.randn(50, 96, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 96, dtype=torch.bfloat16, requires_grad=True)
    assert kept_bytes(lambda: gate_logits(x, weight), exclude=(x, weight))[1] == 0


def test_only_what_is_wanted_and_bad_arguments():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8)
    gate_logits(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    with pytest.raises(ArgumentError, match="weight: "):
        gate_logits(x, weight.bfloat16())
    with pytest.raises(ArgumentError, match="x: "):
        gate_logits(x[0], weight)
