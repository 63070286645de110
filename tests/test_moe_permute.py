"""The permutation between tokens and experts against its definition; its gradients against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import moe, quantize


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def assignments(draw):
    tokens, top_k, experts = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    low = draw(st.sampled_from([0, -1]))
    topk_idx = torch.randint(low, experts, (tokens, top_k), generator=generator(draw(st.integers(0, 999))))
    return topk_idx, experts, draw(st.integers(1, 9))


@given(assignments())
def test_permute_is_a_stable_sort_by_expert(backend_name, case):
    topk_idx, experts, width = case
    tokens, top_k = topk_idx.shape
    x = torch.randn(tokens, width, generator=generator(0))
    x_perm, offsets, source = moe.permute(x, topk_idx, experts)
    slots = [(e if e >= 0 else experts, i) for i, e in enumerate(topk_idx.flatten().tolist())]
    assert source.tolist() == [i for _, i in sorted(slots)]
    assert offsets.tolist() == [sum(e < g for e, _ in slots) for g in range(experts + 1)]
    assert offsets.dtype == torch.int32 and source.dtype == torch.int64
    assert torch.equal(x_perm, x[source // top_k]) and x_perm.shape == (tokens * top_k, width)


def check_unpermute(case, dtype, weighted):
    topk_idx, experts, width = case
    tokens, top_k = topk_idx.shape
    _, _, source = moe.permute(torch.zeros(tokens, width), topk_idx, experts)
    y = torch.randn(tokens * top_k, width, generator=generator(1)).to(dtype)
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, top_k, generator=generator(2)).to(inner) if weighted else None
    out = moe.unpermute(y, source, tokens, top_k, weights)
    exact, size = (
        torch.zeros(tokens, width, dtype=torch.float64),
        torch.zeros(tokens, width, dtype=torch.float64),
    )
    for row, slot in enumerate(source.tolist()):
        term = y[row].double() * (weights.flatten()[slot].double() if weighted else 1)
        exact[slot // top_k] += term
        size[slot // top_k] += term.abs()
    rounding = 2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0
    assert out.dtype == dtype and out.shape == (tokens, width)
    assert ((out.double() - exact).abs() <= rounding + 4 * 2.0**-24 * size).all()


@given(assignments(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_unpermute_adds_up_a_tokens_rows(backend_name, case, dtype, weighted):
    check_unpermute(case, dtype, weighted)


@given(assignments(), st.booleans())
def test_unpermute_in_fp64(case, weighted):
    check_unpermute(case, torch.float64, weighted)


@given(assignments(), st.sampled_from([8, 128, 200, 272]))
def test_permute_quantized_copies_codes_and_scales(backend_name, case, width):
    topk_idx, experts, _ = case
    tokens, top_k = topk_idx.shape
    x = torch.randn(tokens, width, generator=generator(0))
    q, scale = quantize.quantize_1x128(x)
    q_perm, scale_perm, offsets, source = moe.permute_quantized(q, scale, topk_idx, experts)
    _, plain_offsets, plain_source = moe.permute(x, topk_idx, experts)
    assert torch.equal(source, plain_source) and torch.equal(offsets, plain_offsets)
    assert torch.equal(q_perm.view(torch.uint8), q.view(torch.uint8)[source // top_k])
    rows = tokens * top_k
    assert torch.equal(scale_perm[:, :rows], scale[:, source // top_k])
    assert scale_perm.shape == (-(-width // 128), -(-rows // 4) * 4) and (scale_perm[:, rows:] == 1).all()
    # quantised before or after: the same operands
    if tokens:
        again, again_scale = quantize.quantize_1x128(x[source // top_k])
        assert torch.equal(again.view(torch.uint8), q_perm.view(torch.uint8))
        assert torch.equal(again_scale, scale_perm)


def test_unpermute_accumulates_in_slot_order_in_fp32(backend_name):
    """1, then 2^25, then -2^25: only this order gives 0 in fp32 (others give 1), and bf16 sums would differ again."""
    for order, expected in (([1, 2.0**25, -(2.0**25)], 0.0), ([2.0**25, -(2.0**25), 1], 1.0)):
        for experts in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            _, _, source = moe.permute(torch.zeros(1, 4), torch.tensor([experts]), 3)
            y = torch.tensor(order)[source][:, None].expand(3, 4)
            for dtype in (torch.float32, torch.bfloat16):
                assert moe.unpermute(y.to(dtype), source, 1, 3).tolist() == [[expected] * 4]
                assert moe.unpermute(y.to(dtype), source, 1, 3, torch.ones(1, 3)).tolist() == [[expected] * 4]


def test_a_token_does_not_depend_on_its_batch(backend_name):
    topk_idx = torch.rand(64, 8, generator=generator(3)).topk(4).indices
    x = torch.randn(64, 33, generator=generator(4))
    weights = torch.rand(64, 4, generator=generator(5))

    def through(part):
        x_perm, _, source = moe.permute(x[part], topk_idx[part], 8)
        return moe.unpermute(x_perm * 1.5, source, x[part].shape[0], 4, weights[part])

    assert torch.equal(through(slice(None))[10:20], through(slice(10, 20)))


def test_permute_and_unpermute_gradients():
    topk_idx = torch.tensor([[0, 2], [2, 1], [-1, 0], [1, 2]])
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator(6)).requires_grad_()
    weights = torch.rand(4, 2, dtype=torch.float64, generator=generator(7)).requires_grad_()
    _, _, source = moe.permute(x.detach(), topk_idx, 3)
    y = torch.randn(8, 5, dtype=torch.float64, generator=generator(8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moe.permute(x, topk_idx, 3)[0], (x,))
    assert torch.autograd.gradcheck(lambda y: moe.unpermute(y, source, 4, 2), (y,))
    assert torch.autograd.gradcheck(lambda y, w: moe.unpermute(y, source, 4, 2, w), (y, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_working_precision(backend_name, dtype):
    """Against fp64 autograd of the plain formula, with enough rows for more than one chunk inside."""
    tokens, top_k, width = 700 if backend_name == "reference" else 40, 2, 512
    topk_idx = torch.rand(tokens, 4, generator=generator(9)).topk(top_k).indices
    x = torch.randn(tokens, width, generator=generator(10)).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k, generator=generator(11)).requires_grad_()
    grad = torch.randn(tokens, width, generator=generator(12)).to(dtype)
    x_perm, _, source = moe.permute(x, topk_idx, 4)
    x_perm.retain_grad()
    moe.unpermute(x_perm, source, tokens, top_k, weights).backward(grad)

    gathered = x.detach().double()[source // top_k].requires_grad_()
    wide_weights = weights.detach().double().requires_grad_()
    rows = gathered * wide_weights.flatten()[source, None]
    torch.zeros(tokens, width, dtype=torch.float64).index_add(0, source // top_k, rows).backward(
        grad.double()
    )
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    torch.testing.assert_close(x_perm.grad.double(), gathered.grad, rtol=unit, atol=0)
    torch.testing.assert_close(weights.grad.double(), wide_weights.grad, rtol=1e-4, atol=1e-4)
    summed = torch.zeros(tokens, width, dtype=torch.float64).index_add(
        0, source // top_k, x_perm.grad.double()
    )
    torch.testing.assert_close(x.grad.double(), summed, rtol=unit, atol=4 * 2.0**-22)
    assert x.grad.dtype == dtype and weights.grad.dtype == torch.float32
