"""Fp8Experts: figure 6 for groups of rows, FP8 dispatch, and the whole routed layer against its parts."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_ops import ArgumentError
from deepseek_ops.moe import permute, unpermute
from deepseek_ops.nn import Fp8Experts, Fp8MLP, quantize_input
from tests.nn.oracle import cached, kept_bytes, quantised, relative_rms, swiglu, turned


def make(experts, d, inner, std=0.1):
    module = Fp8Experts(experts, d, inner)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=std)
    return module


def choices(tokens, top_k, experts):
    return torch.rand(tokens, experts).topk(top_k, dim=1).indices


@pytest.mark.parametrize("sizes", [[5, 0, 140, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_experts_are_the_grouped_gemms_of_figure_6(sizes):
    torch.manual_seed(sum(sizes))
    d, inner, rows = 136, 64, sum(sizes)
    experts = make(len(sizes), d, inner)
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
        xq = cached(x.detach()[a:b])
        h = (xq @ w1.T).float()
        g = gate.detach()[a:b].double()
        out = quantised(swiglu(h.double(), g).float(), (1, 128), pow2=False) @ w2.T
        assert relative_rms(y.detach()[a:b], out) < 1e-3
        # Backward starts from the FP8 copy of h and recomputes SwiGLU from it; dy arrived in FP8 (power-of-two scales).
        hq, gq = cached(h).requires_grad_(), g.clone().requires_grad_()
        dyq = cached(dy[a:b])
        recomputed = swiglu(hq, gq)
        recomputed.backward(dyq @ w2)
        act_t = quantised(recomputed.detach().float(), (128, 1), pow2=False)
        assert relative_rms(experts.down.grad[e], turned(dyq).T @ act_t) < 2e-3
        dh = hq.grad.float()
        assert relative_rms(x.grad[a:b], quantised(dh, (1, 128), pow2=False) @ w1) < 2e-3
        d_gate_up = quantised(dh, (128, 1), pow2=False).T @ turned(xq)
        assert relative_rms(experts.gate_up.grad[e], d_gate_up) < 2e-3
        assert relative_rms(gate.grad[a:b], gq.grad) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_routed_is_permute_experts_unpermute_bit_for_bit(dtype, elsewhere):
    torch.manual_seed(4)
    tokens, top_k, count, d = 37, 3, 8, 136
    experts = make(count, d, 40)
    x = torch.randn(tokens, d).to(dtype)
    idx = choices(tokens, top_k, count)
    if elsewhere:  # another rank's experts
        idx[::3, 1] = -1
        idx[1, 0] = count
    gate, dout = torch.rand(tokens, top_k), torch.randn(tokens, d).to(dtype)
    results = []
    for whole in (True, False):
        experts.zero_grad(set_to_none=True)
        a, g = x.clone().requires_grad_(), gate.clone().requires_grad_()
        if whole:
            out = experts.routed(a, g, idx)
        else:
            rows, offsets, source = permute(a, idx, count)
            row_weight = g.flatten().index_select(0, source)
            out = unpermute(experts(rows, row_weight, offsets), source, tokens, top_k)
        out.backward(dout)
        results.append((out.detach(), a.grad, g.grad, experts.gate_up.grad, experts.down.grad))
    for name, got, want in zip(("out", "dx", "dgate", "dgate_up", "ddown"), *results, strict=True):
        assert torch.equal(got, want), name
    assert all(torch.isfinite(t).all() for t in results[0])
    with torch.no_grad():
        assert torch.equal(experts.routed(x, gate, idx), results[0][0])
        assert torch.equal(experts.routed(x, gate, idx, quantize_input(x)), results[0][0])


def test_one_expert_with_gate_one_is_the_mlp():
    """Groups and routing add nothing of their own: only the FP8 form of the gradient differs from a dense FFN."""
    torch.manual_seed(5)
    experts, mlp = make(1, 128, 64), Fp8MLP(128, 64)
    mlp.gate_up.weight.data.copy_(experts.gate_up[0])
    mlp.down.weight.data.copy_(experts.down[0])
    x = torch.randn(30, 128)
    idx = torch.zeros(30, 1, dtype=torch.int64)
    assert torch.equal(experts.routed(x, torch.ones(30, 1), idx), mlp(x))


def test_what_is_kept():
    """Per token: its FP8 input once, whatever top_k; per row: SwiGLU's input in FP8; the routing. No bf16 copy."""
    tokens, top_k, count, d, inner = 64, 4, 8, 256, 128
    experts = make(count, d, inner)
    x = torch.randn(tokens, d, dtype=torch.bfloat16, requires_grad=True)
    gate, idx = torch.rand(tokens, top_k, requires_grad=True), choices(tokens, top_k, count)
    weights = [t for weight in experts.fp8_weights() for t in weight]
    _, size = kept_bytes(lambda: experts.routed(x, gate, idx), exclude=weights)
    values = tokens * d + tokens * top_k * 2 * inner
    routing = tokens * top_k * (4 + 8 + 8) + (count + 1) * 4  # weights, choices, source; offsets
    assert size == values * (1 + 4 / 128) + routing
    with torch.no_grad():
        _, size = kept_bytes(lambda: experts.routed(x, gate, idx))
    assert size == 0


@pytest.mark.parametrize("frozen", ["x", "gate", "gate_up", "down"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    torch.manual_seed(6)
    experts, same = make(4, 128, 64), Fp8Experts(4, 128, 64)
    same.load_state_dict(experts.state_dict())
    idx = choices(40, 2, 4)
    dout = torch.randn(40, 128)
    runs = []
    for module, skip in ((same, None), (experts, frozen)):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            "x": torch.randn(40, 128, generator=generator).requires_grad_(),
            "gate": torch.rand(40, 2, generator=generator).requires_grad_(),
            "gate_up": module.gate_up,
            "down": module.down,
        }
        if skip:
            tensors[skip].requires_grad_(False)
        module.routed(tensors["x"], tensors["gate"], idx).backward(dout)
        runs.append({name: t.grad for name, t in tensors.items()})
    assert runs[1].pop(frozen) is None
    for name, gradient in runs[1].items():
        assert torch.equal(gradient, runs[0][name]), name


@pytest.mark.parametrize("whole", [True, False])
def test_no_value_of_a_device_tensor_is_read_on_the_host(whole):
    """Forward and backward on fake tensors, which have shapes and no values: anything that reads one raises."""
    with FakeTensorMode():
        experts = Fp8Experts(8, 128, 64)
        x = torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True)
        gate = torch.rand(32, 2, requires_grad=True)
        idx = torch.zeros(32, 2, dtype=torch.int64)
        for _ in range(2):  # the second time, gradients are added in place
            if whole:
                out = experts.routed(x, gate, idx)
            else:
                offsets = torch.zeros(9, dtype=torch.int32)
                out = experts(x, gate[:, 0], offsets)
            out.sum().backward()
        assert experts.gate_up.grad.shape == experts.gate_up.shape and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("tokens", "idx"), [(0, "some"), (5, "none")])
def test_nothing_to_do(tokens, idx):
    experts = make(4, 128, 64)
    x = torch.randn(tokens, 128, requires_grad=True)
    gate = torch.rand(tokens, 2, requires_grad=True)
    chosen = choices(tokens, 2, 4) if idx == "some" else torch.full((tokens, 2), -1)
    out = experts.routed(x, gate, chosen)
    out.sum().backward()
    assert not out.any() and not x.grad.any() and not gate.grad.any() and not experts.down.grad.any()


def test_bad_arguments():
    experts = Fp8Experts(2, 16, 8)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"x: must be \[rows, 16\]"):
        experts(torch.randn(2, 8), torch.ones(2), offsets)
    with pytest.raises(ArgumentError, match=r"x: must be \[tokens, 16\]"):
        experts.routed(torch.randn(2, 8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="topk_idx: must be int64"):
        experts.routed(torch.randn(2, 16), torch.ones(2, 1), torch.zeros(2, 1))
    with pytest.raises(ArgumentError, match="topk_weight"):
        experts.routed(torch.randn(2, 16), torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="hidden_size: must be a multiple of 8"):
        Fp8Experts(2, 20, 8)
