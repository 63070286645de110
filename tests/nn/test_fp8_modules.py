"""FP8 modules against fp64 products of operands quantised here by other code (report figure 6, section 3.3)."""

import math

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops.nn import Fp8Experts, Fp8Linear
from deepseek_ops.optimizer import adamw_


def quantised(x, tile, *, pow2):
    """fp64 values of x after E4M3 with one scale per `tile` = (rows, columns); loops over tiles on purpose."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            part = x[i : i + tile[0], j : j + tile[1]].float()
            amax = part.abs().max()
            if amax == 0:
                out[i : i + tile[0], j : j + tile[1]] = 0
                continue
            # The multiplier is an fp32 number of its own, 448 / amax: bf16 inputs meet ties often enough to see it.
            scale = 2.0 ** math.ceil(math.log2(amax / 448)) if pow2 else float(amax / 448)
            multiplier = 1 / scale if pow2 else torch.tensor(448.0) / amax  # a plain 448 / amax rounds twice
            q = (part * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[i : i + tile[0], j : j + tile[1]] = q.double() * scale
    return out


def relative_rms(actual, expected):
    return float((actual.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "k"), [(200, 144, 264), (128, 128, 128), (3, 8, 16)])
def test_linear_is_the_three_gemms_of_figure_6(dtype, tokens, n, k):
    torch.manual_seed(tokens)
    linear = Fp8Linear(k, n)
    x = torch.randn(tokens, k).to(dtype).requires_grad_()
    dy = torch.randn(tokens, n).to(dtype)
    y = linear(x)
    y.backward(dy)
    w = quantised(linear.weight.detach(), (128, 128), pow2=False)
    x_row = quantised(x.detach(), (1, 128), pow2=True)
    bound = 4e-4 if dtype == torch.float32 else 3e-3  # fp32 sums; bf16 adds one rounding
    assert y.dtype == dtype and relative_rms(y.detach(), x_row @ w.T) < bound
    assert x.grad.dtype == dtype and relative_rms(x.grad, quantised(dy, (1, 128), pow2=False) @ w) < bound
    expected = quantised(dy, (128, 1), pow2=False).T @ quantised(x_row, (128, 1), pow2=True)
    assert linear.weight.grad.dtype == torch.float32
    assert relative_rms(linear.weight.grad, expected) < 4e-4


def e5m6(x):
    """fp64 values of x in 1x128 tiles of E5M6 with power-of-two scales: 6 mantissa bits, no subnormals needed here."""
    out = torch.empty_like(x, dtype=torch.float64)
    for j in range(0, x.shape[1], 128):
        tile = x[:, j : j + 128].double()
        scale = 2.0 ** torch.ceil(torch.log2(tile.abs().amax(1, keepdim=True) / 65024))
        fraction, exponent = torch.frexp(tile / scale)
        out[:, j : j + 128] = torch.ldexp((fraction * 128).round() / 128, exponent) * scale
    return out


@pytest.mark.parametrize(("cache", "bytes_per_value"), [("fp8", 1 + 4 / 128), ("e5m6", 1.5 + 4 / 128)])
def test_what_is_cached_for_wgrad(cache, bytes_per_value):
    torch.manual_seed(0)
    x, dy = torch.randn(256, 256), torch.randn(256, 128)
    linear = Fp8Linear(256, 128, cache=cache)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x)
    y.backward(dy)
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel() * bytes_per_value
    kept = quantised(x, (1, 128), pow2=True) if cache == "fp8" else e5m6(x)
    expected = quantised(dy, (128, 1), pow2=False).T @ quantised(kept, (128, 1), pow2=True)
    assert relative_rms(linear.weight.grad, expected) < 4e-4


def test_leading_dimensions_and_empty_input():
    linear = Fp8Linear(16, 8)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(linear(x).view(6, 8), linear(x.view(6, 16)), rtol=0, atol=0)
    empty = torch.randn(0, 16, requires_grad=True)
    linear(empty).sum().backward()
    assert empty.grad.shape == (0, 16) and not linear.weight.grad.any()


def test_weights_are_quantised_once_per_optimizer_step():
    linear = Fp8Linear(128, 128)
    x = torch.randn(4, 128)
    linear(x)
    first = linear.fp8_weight()
    linear(x).sum().backward()
    assert linear.fp8_weight() is first
    weight = linear.weight.detach()
    moments = [torch.zeros_like(weight)], [torch.zeros_like(weight)]
    adamw_([weight], [linear.weight.grad], *moments, lr=0.1, step=1)
    second = linear.fp8_weight()
    assert second is not first and not torch.equal(second.q.float(), first.q.float())
    assert torch.equal(second.q_t.float(), second.q.float().T)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="cache: must be one of 'fp8', 'e5m6'; got 'bf16'"):
        Fp8Linear(16, 16, cache="bf16")
    with pytest.raises(ArgumentError, match="in_features: must be a multiple of 8"):
        Fp8Linear(12, 16)
    with pytest.raises(ArgumentError, match="x: last dimension must be 16"):
        Fp8Linear(16, 16)(torch.randn(2, 8))
    with pytest.raises(ArgumentError, match=r"x: must be \[rows, 16\]"):
        Fp8Experts(2, 16, 8)(torch.randn(2, 8), torch.ones(2), torch.tensor([0, 1, 2], dtype=torch.int32))


@pytest.mark.parametrize("sizes", [[5, 0, 140, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_experts_are_the_grouped_gemms_of_figure_6(sizes):
    torch.manual_seed(sum(sizes))
    d, inner, rows = 136, 64, sum(sizes)
    experts = Fp8Experts(len(sizes), d, inner)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.1)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    x = torch.randn(rows, d, requires_grad=True)
    gate = torch.rand(rows, requires_grad=True)
    dy = torch.randn(rows, d)
    y = experts(x, gate, offsets)
    y.backward(dy)
    for e, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if a == b:
            assert not experts.gate_up.grad[e].any() and not experts.down.grad[e].any()
            continue
        w1 = quantised(experts.gate_up.detach()[e], (128, 128), pow2=False)
        w2 = quantised(experts.down.detach()[e], (128, 128), pow2=False)
        xq = quantised(x.detach()[a:b], (1, 128), pow2=True)
        h = (xq @ w1.T).float()
        g = gate.detach()[a:b].double()[:, None]

        def act(h, g):
            return torch.nn.functional.silu(h[:, :inner]) * h[:, inner:] * g

        out = quantised(act(h.double(), g).float(), (1, 128), pow2=False) @ w2.T
        assert relative_rms(y.detach()[a:b], out) < 1e-3
        # Backward starts from the FP8 copy of h and recomputes SwiGLU from it.
        hq = quantised(h, (1, 128), pow2=True).requires_grad_()
        gq = g.clone().requires_grad_()
        d_act = quantised(dy[a:b], (1, 128), pow2=True) @ w2
        recomputed = act(hq, gq)
        recomputed.backward(d_act)
        d_down = quantised(dy[a:b], (128, 1), pow2=False).T @ quantised(
            recomputed.detach().float(), (128, 1), pow2=False
        )
        assert relative_rms(experts.down.grad[e], d_down) < 2e-3
        dh = hq.grad.float()
        assert relative_rms(x.grad[a:b], quantised(dh, (1, 128), pow2=False) @ w1) < 2e-3
        d_gate_up = quantised(dh, (128, 1), pow2=False).T @ quantised(xq, (128, 1), pow2=True)
        assert relative_rms(experts.gate_up.grad[e], d_gate_up) < 2e-3
        assert relative_rms(gate.grad[a:b], gq.grad[:, 0]) < 1e-4
