"""attention_linear: one E5M6 copy of attention's output serves attention's backward and Wgrad (section 3.3.3)."""

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops.attention import mla_attention, mla_attention_backward
from deepseek_ops.nn import Fp8Linear, attention_linear
from deepseek_ops.quantize import pack_e5m6, unpack_e5m6
from tests.nn.oracle import e5m6, kept_bytes, quantised, relative_rms, turned

HEADS, NOPE, ROPE, VALUE, OUT = 2, 16, 8, 64, 48
SCALE = (NOPE + ROPE) ** -0.5


def inputs(tokens, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, HEADS, NOPE + ROPE), (tokens, HEADS, NOPE), (tokens, ROPE), (tokens, HEADS, VALUE)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def make():
    torch.manual_seed(1)
    linear = Fp8Linear(HEADS * VALUE, OUT, cache="e5m6")
    with torch.no_grad():
        linear.weight.normal_(std=0.1)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_parts_but_for_the_e5m6_copy(dtype):
    tokens = 70
    cu = torch.tensor([0, 30, tokens], dtype=torch.int32)
    linear, other = make(), make()
    dy = torch.randn(tokens, OUT).to(dtype)
    q, k_nope, k_pe, v = inputs(tokens, dtype)
    y = attention_linear(linear, q, k_nope, k_pe, v, cu, softmax_scale=SCALE)
    y.backward(dy)

    # The parts: attention from autograd, the Linear on its output; the forward pass is the same, bit for bit.
    with torch.no_grad():
        out, lse = mla_attention(q, k_nope, k_pe, v, cu, softmax_scale=SCALE)
    flat = out.flatten(1).detach().requires_grad_()
    z = other(flat)
    z.backward(dy)
    assert torch.equal(y, z) and torch.equal(linear.weight.grad, other.weight.grad)
    # Attention's backward sees what the 12-bit format gives back, and nothing else of its output.
    seen = unpack_e5m6(*pack_e5m6(flat.detach()), HEADS * VALUE, dtype=dtype)
    dout = flat.grad.view_as(out)
    want = mla_attention_backward(dout, q, k_nope, k_pe, v, seen.view_as(out), lse, cu, softmax_scale=SCALE)
    for got, expected in zip((q.grad, k_nope.grad, k_pe.grad, v.grad), want, strict=True):
        assert torch.equal(got, expected)
    exact = mla_attention_backward(dout, q, k_nope, k_pe, v, out, lse, cu, softmax_scale=SCALE)
    difference = relative_rms(want[0], exact[0].double())
    assert 0 < difference < 2e-2  # half of 2^-6 per value, averaged over a row


def test_wgrad_against_figure_6():
    linear = make()
    cu = torch.tensor([0, 40], dtype=torch.int32)
    q, k_nope, k_pe, v = inputs(40, torch.float32)
    dy = torch.randn(40, OUT)
    attention_linear(linear, q, k_nope, k_pe, v, cu, softmax_scale=SCALE).backward(dy)
    out, _ = mla_attention(q, k_nope, k_pe, v, cu, softmax_scale=SCALE)
    want = quantised(dy, (128, 1), pow2=False).T @ turned(e5m6(out.detach().flatten(1)))
    assert relative_rms(linear.weight.grad, want) < 4e-4


def test_what_is_kept():
    tokens, linear = 64, make()
    operands = inputs(tokens, torch.bfloat16)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    exclude = (*operands, *linear.fp8_weight())
    _, size = kept_bytes(
        lambda: attention_linear(linear, *operands, cu, softmax_scale=SCALE), exclude=exclude
    )
    width = HEADS * VALUE
    assert (
        size == tokens * (width * 1.5 + width // 128 * 4 + HEADS * 4) + 8
    )  # E5M6, its scales, lse; cu_seqlens
    with torch.no_grad():
        y, size = kept_bytes(lambda: attention_linear(linear, *operands, cu, softmax_scale=SCALE))
    assert size == 0 and y.grad_fn is None


@pytest.mark.parametrize("frozen", ["weight", "operands"])
def test_frozen_parts(frozen):
    linear, operands = make(), inputs(20, torch.float32)
    cu = torch.tensor([0, 20], dtype=torch.int32)
    for tensor in [linear.weight] if frozen == "weight" else operands:
        tensor.requires_grad_(False)
    attention_linear(linear, *operands, cu, softmax_scale=SCALE).sum().backward()
    assert (linear.weight.grad is None) == (frozen == "weight")
    assert all((t.grad is None) == (frozen == "operands") for t in operands)


def test_bad_arguments():
    operands = inputs(4, torch.float32)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"linear: must take v's H \* Dv = 128 inputs; got 64"):
        attention_linear(Fp8Linear(64, 8, cache="e5m6"), *operands, cu, softmax_scale=1.0)
    with pytest.raises(ArgumentError, match='linear: must be made with cache="e5m6"; got fp8'):
        attention_linear(Fp8Linear(128, 8), *operands, cu, softmax_scale=1.0)
    out, lse = mla_attention(*operands, cu, softmax_scale=1.0)
    with pytest.raises(ArgumentError, match="dout: "):
        mla_attention_backward(out[:2], *operands, out, lse, cu, softmax_scale=1.0)
    with pytest.raises(ArgumentError, match="lse: "):
        mla_attention_backward(out, *operands, out, lse[:2], cu, softmax_scale=1.0)
