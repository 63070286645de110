"""mla_attention against a scalar-minded fp64 oracle: values, gradients, packed documents, borders."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError, attention
from deepseek_ops.attention import merge_lse, mla_attention
from deepseek_ops.reference import documents

NAMES = ("q", "k_nope", "k_pe", "v")


def bounds(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def make(sizes_q, sizes_k=None, heads=2, nope=8, rope=4, value=6, dtype=torch.float32, seed=0):
    sizes_k = sizes_q if sizes_k is None else sizes_k
    g = torch.Generator().manual_seed(seed)
    tq, tk = sum(sizes_q), sum(sizes_k)
    shapes = ((tq, heads, nope + rope), (tk, heads, nope), (tk, rope), (tk, heads, value))
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return inputs, bounds(sizes_q), bounds(sizes_k)


def oracle(q, k_nope, k_pe, v, cu_q, cu_k, scale, causal, dtype=torch.float64):
    """One document and head at a time in `dtype`: a boolean mask, a plain softmax, nothing shared with the op.

    With dtype bf16 it is the bf16 PyTorch computation whose error the criterion doubles.
    """
    q, k_nope, k_pe, v = (t.to(dtype) for t in (q, k_nope, k_pe, v))
    outs = torch.zeros(*q.shape[:2], v.shape[2], dtype=dtype)
    lses = torch.full(q.shape[:2], -torch.inf, dtype=dtype)
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        for h in range(q.shape[1]):
            k = torch.cat([k_nope[k0:k1, h], k_pe[k0:k1]], 1)
            scores = q[q0:q1, h] @ k.T * scale
            if causal:
                row = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
                scores = scores.masked_fill(torch.arange(k1 - k0) > row, -torch.inf)
            seen = (scores > -torch.inf).any(1)
            if seen.any():
                rows = torch.arange(q0, q1)[seen]
                outs = outs.index_put((rows, torch.tensor(h)), scores[seen].softmax(1) @ v[k0:k1, h])
                lses = lses.index_put((rows, torch.tensor(h)), scores[seen].logsumexp(1))
    return outs, lses


def gradients(function, inputs, dout):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = function(*leaves)
    if not out.requires_grad:
        return (out, lse, *(torch.zeros_like(t) for t in leaves))
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return (out.detach(), lse.detach(), *grads)


def compare(inputs, cu_q, cu_k, causal, scale=0.3, factor=2.0):
    """Every output and gradient: error <= 2x that of the plain computation in the inputs' dtype, against fp64."""
    g = torch.Generator().manual_seed(99)
    dtype = inputs[0].dtype
    dout = torch.randn(*inputs[0].shape[:2], inputs[3].shape[2], generator=g).to(dtype)

    def plain(kind):
        return gradients(
            lambda *x: oracle(*x, cu_q, cu_k, scale, causal, kind), [t.to(kind) for t in inputs], dout
        )

    ours = gradients(
        lambda *x: mla_attention(*x, cu_q, cu_k, softmax_scale=scale, causal=causal), inputs, dout
    )
    for name, have, want, low in zip(
        ("out", "lse", *NAMES), ours, plain(torch.float64), plain(dtype), strict=True
    ):
        assert have.shape == want.shape, name
        if name == "lse":
            assert have.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(have == -torch.inf, want == -torch.inf)
            have, want, low = (torch.where(t == -torch.inf, 0, t.double()) for t in (have, want, low))
            # fp32 even for bf16 inputs, whose products are exact in fp32
            torch.testing.assert_close(have, want, atol=2e-6, rtol=2e-6)
            continue
        assert have.dtype == dtype and not have.isnan().any(), name
        error, allowed = (
            t.double().sub(want).square().mean().sqrt() if t.numel() else 0.0 for t in (have, low)
        )
        noise = 1e-6 if dtype == torch.float32 else 1e-12 if dtype == torch.float64 else 1e-5
        assert error <= factor * allowed + noise, (name, float(error), float(allowed))
    return ours


LENGTHS = st.sampled_from([0, 1, 2, 3, 8, 9, 31, 47, 48, 63, 64, 65, 100, 127, 128, 129])


@given(sizes=st.lists(LENGTHS, min_size=0, max_size=7), heads=st.integers(1, 3), causal=st.booleans())
def test_packed_documents_match_the_oracle(sizes, heads, causal):
    inputs, cu, _ = make(sizes, heads=heads)
    compare(inputs, cu, cu, causal)


@given(pairs=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=6), causal=st.booleans())
def test_query_and_key_lengths_may_differ(pairs, causal):
    sizes_q, sizes_k = zip(*pairs, strict=True)
    compare(*make(sizes_q, sizes_k), causal)


@given(
    pairs=st.lists(st.tuples(st.integers(57, 64), st.integers(53, 72)), min_size=2, max_size=5),
    causal=st.booleans(),
    heads=st.integers(1, 3),
)
def test_documents_of_one_group_may_have_different_diagonals(pairs, causal, heads):
    sizes_q, sizes_k = zip(*pairs, strict=True)
    compare(*make(sizes_q, sizes_k, heads=heads), causal)


@given(sizes=st.lists(LENGTHS, min_size=1, max_size=5), seed=st.integers(0, 9))
def test_bf16_error_is_at_most_twice_that_of_pytorch_in_bf16(sizes, seed):
    inputs, cu, _ = make(sizes, nope=32, rope=16, value=32, dtype=torch.bfloat16, seed=seed)
    compare(inputs, cu, cu, True, scale=48**-0.5)


@pytest.mark.parametrize("dims", [(128, 64, 128), (32, 16, 32), (1, 2, 3), (5, 0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_dimensions(dims, dtype):
    nope, rope, value = dims
    inputs, cu, _ = make([70, 3], nope=nope, rope=rope, value=value, dtype=dtype)
    compare(inputs, cu, cu, True, scale=(nope + rope) ** -0.5)
    inputs, cu, _ = make([70, 3], heads=0, nope=nope, rope=rope, value=value, dtype=dtype)
    compare(inputs, cu, cu, True)


@pytest.mark.parametrize("sizes", [[1] * 300, [150] + [1, 2, 3] * 60, [8] * 64, [0, 1, 0], [0], []])
def test_many_short_documents(sizes):
    inputs, cu, _ = make(sizes)
    compare(inputs, cu, cu, True)


def test_gradcheck_through_lengths_that_differ():
    inputs, cu_q, cu_k = make(
        [3, 4, 1, 0, 2], [3, 2, 4, 2, 0], heads=2, nope=3, rope=2, value=2, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in inputs]
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda *x, causal=causal: mla_attention(*x, cu_q, cu_k, softmax_scale=0.7, causal=causal)[0],
            leaves,
        )


def test_blocks_of_long_documents_agree_with_one_block(monkeypatch):
    from deepseek_ops.reference import attention as reference

    inputs, cu_q, cu_k = make([200, 220, 210, 40], [215, 200, 225, 300], heads=3, dtype=torch.float64)
    results = []
    for rows, scores in ((1024, 1 << 30), (32, 1 << 12), (7, 1)):
        monkeypatch.setattr(reference, "ROWS", rows)
        monkeypatch.setattr(reference, "SCORES", scores)
        results.append(compare(inputs, cu_q, cu_k, True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_rows_without_keys_and_padding_rows_are_zero_and_have_no_gradient():
    inputs, cu_q, cu_k = make([5, 3, 4], [2, 0, 4])
    q, k_nope, k_pe, v = inputs
    pad = torch.full((6, *q.shape[1:]), torch.nan)
    q = torch.cat([q, pad])
    k_nope, k_pe, v = (torch.cat([t, torch.full((2, *t.shape[1:]), torch.nan)]) for t in (k_nope, k_pe, v))
    leaves = [t.requires_grad_() for t in (q, k_nope, k_pe, v)]
    out, lse = mla_attention(*leaves, cu_q, cu_k, softmax_scale=0.5)
    out.sum().backward()
    keyless = [0, 1, 2, 5, 6, 7, *range(12, 18)]
    seen = [i for i in range(18) if i not in keyless]
    assert torch.equal(out[keyless], torch.zeros_like(out[keyless])) and (lse[keyless] == -torch.inf).all()
    assert (leaves[0].grad[keyless] == 0).all() and (leaves[0].grad[seen] != 0).any(-1).all()
    assert all((t.grad[6:] == 0).all() and not t.grad.isnan().any() for t in leaves[1:])
    assert lse[seen].isfinite().all()


@pytest.mark.parametrize("sizes_k", [[2, 4], [60, 64]])
def test_rows_without_keys_neither_give_nor_take(sizes_k):
    inputs, cu_q, cu_k = make([67, 71], sizes_k)
    dout = torch.randn(138, 2, 6, generator=torch.Generator().manual_seed(1))
    keyless = [*range(67 - sizes_k[0]), *range(67, 138 - sizes_k[1])]

    def run(inputs, dout):
        return gradients(lambda *x: mla_attention(*x, cu_q, cu_k, softmax_scale=0.4), inputs, dout)

    clean = run(inputs, dout)
    q, dout_nan = inputs[0].clone(), dout.clone()
    q[keyless] = torch.nan
    dout_nan[keyless] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, run([q, *inputs[1:]], dout_nan), strict=True))
    out, lse, dq, *_ = run([inputs[0], *(torch.full_like(t, torch.nan) for t in inputs[1:])], dout)
    assert (out[keyless] == 0).all() and (lse[keyless] == -torch.inf).all() and (dq[keyless] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[33, 33, 33], [33, 40, 34], [1, 1, 1], [65, 2, 64]])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_does_not_cross_a_document_border(sizes, dtype, causal):
    inputs, cu, _ = make(sizes, dtype=dtype)
    a, b = int(cu[1]), int(cu[2])
    dout = torch.randn(int(cu[-1]), 2, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    poisoned = [t.clone() for t in (*inputs, dout)]
    for t in poisoned:
        t[a:b] = torch.nan

    def run(inputs, dout):
        return gradients(lambda *x: mla_attention(*x, cu, softmax_scale=0.4, causal=causal), inputs, dout)

    for clean, dirty in zip(run(inputs, dout), run(poisoned[:4], poisoned[4]), strict=True):
        assert torch.equal(clean[:a], dirty[:a]) and torch.equal(clean[b:], dirty[b:])
        assert dirty[a:b].isnan().any()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores(shift, dtype):
    inputs, cu, _ = make([70], dtype=dtype)
    inputs[0][..., -1], inputs[2][:, -1] = shift, 1.0  # adds `shift` to every score: lse far beyond +-88
    # An fp32 lse of 300 is known to 1.5e-5, and P is recomputed from it; a softmax has no such step.
    factor = 4.0 if dtype == torch.float32 else 2.0
    out, lse, *grads = compare(inputs, cu, cu, True, scale=1.0, factor=factor)
    assert (lse.abs() > 88).all() and all(t.isfinite().all() for t in (out, lse, *grads))


def test_k_pe_gradient_is_the_sum_over_heads():
    inputs, cu, _ = make([20], heads=5, dtype=torch.float64)
    q, k_nope, k_pe, v = inputs
    total = torch.zeros_like(k_pe)
    for h in range(5):
        leaf = k_pe.clone().requires_grad_()
        mla_attention(q[:, h : h + 1], k_nope[:, h : h + 1], leaf, v[:, h : h + 1], cu, softmax_scale=0.3)[
            0
        ].sum().backward()
        total += leaf.grad
    leaf = k_pe.clone().requires_grad_()
    mla_attention(q, k_nope, leaf, v, cu, softmax_scale=0.3)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, total)


def test_strided_inputs_and_repetition_give_the_same_bits():
    (q, k_nope, k_pe, v), cu, _ = make([50, 64, 7], nope=8, rope=4, value=8)
    kv = torch.cat([k_nope, v], 2)  # the up-projection's output; both halves are views of it
    wide = torch.randn(121, 3, 12)
    wide[:, 1:] = q
    strided = (wide[:, 1:], kv[..., :8], torch.cat([k_pe, k_pe], 1)[:, 4:], kv[..., 8:])
    dout = torch.randn(2, 8, 121).permute(2, 0, 1)
    first = gradients(
        lambda *x: mla_attention(*x, cu, softmax_scale=0.3), (q, k_nope, k_pe, v), dout.contiguous()
    )
    leaves = [t.requires_grad_() for t in strided]
    for _ in range(3):
        out, lse = mla_attention(*leaves, cu, softmax_scale=0.3)
        grads = torch.autograd.grad(out, leaves, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, (out, lse, *grads), strict=True))


def test_documents_of_similar_length_share_a_group_and_waste_is_bounded():
    sizes = torch.randint(1, 5000, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    cu = bounds(sizes)
    found = documents.groups(cu, cu, sum(sizes), sum(sizes), True)
    assert sum(len(g.queries.starts) for g in found) == 400 and len(found) <= 45
    for group in found:
        assert group.queries.longest < 1.25 * min(group.queries.lengths)
    equal = documents.groups(bounds([256] * 16), bounds([256] * 16), 4096, 4096, True)
    assert len(equal) == 1 and equal[0].queries.is_view


def test_lse_merge_identity():
    """Attention over a document's keys = merge of attention over two parts of them, one part empty included."""
    (q, k_nope, k_pe, v), _, _ = make([12], [40], dtype=torch.float64)
    cu_q = bounds([12])

    def part(a, b):
        return mla_attention(
            q, k_nope[a:b], k_pe[a:b], v[a:b], cu_q, bounds([b - a]), softmax_scale=0.3, causal=False
        )

    whole = part(0, 40)
    for cut in (0, 1, 17, 40):
        merged = merge_lse(*part(0, cut), *part(cut, 40))
        for a, b in zip(merged, whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_merge_ignores_a_side_without_keys_even_if_it_holds_nan():
    out = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)
    lse = torch.tensor([0.5, -torch.inf, 200.0])
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for merged, merged_lse in (merge_lse(out, lse, *nothing), merge_lse(*nothing, out, lse)):
        assert torch.equal(merged, torch.tensor([[1, 2], [0, 0], [5, 6]], dtype=torch.bfloat16))
        assert torch.equal(merged_lse, lse)
    # hand computed: weights e^0 : e^ln3 = 1 : 3
    merged, merged_lse = merge_lse(
        torch.tensor([[8.0]]), torch.tensor([0.0]), torch.tensor([[4.0]]), torch.tensor([3.0]).log()
    )
    torch.testing.assert_close(merged, torch.tensor([[5.0]]))
    torch.testing.assert_close(merged_lse, torch.tensor([4.0]).log())
    assert merge_lse(out[:0], lse[:0], out[:0], lse[:0])[0].shape == (0, 2)


def test_opcheck():
    inputs, cu_q, cu_k = make([5, 0, 9], [5, 2, 7])
    args = (*inputs, cu_q, cu_k, 0.3, True)
    torch.library.opcheck(attention._mla_attention.raw, args)
    out, lse = attention._mla_attention(*args)
    torch.library.opcheck(attention._mla_attention_backward.raw, (out, *inputs, out, lse, *args[4:]))
    torch.library.opcheck(attention._merge_lse.raw, (out, lse, out, lse))


def test_compile_with_gradient():
    inputs, cu, _ = make([9, 4])

    def loss(q, k_nope, k_pe, v):
        out, lse = mla_attention(q * 2, k_nope, k_pe, v, cu, softmax_scale=0.3)
        return merge_lse(out.detach(), lse, out.detach(), lse)[0].sum() + out.square().sum()

    want_leaves, have_leaves = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    loss(*want_leaves).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*have_leaves).backward()
    for a, b in zip(want_leaves, have_leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_lse_carries_no_gradient():
    inputs, cu, _ = make([4])
    out, lse = mla_attention(*[t.requires_grad_() for t in inputs], cu, softmax_scale=0.3)
    assert out.requires_grad and not lse.requires_grad


def test_argument_errors():
    inputs, cu, _ = make([5, 4])
    names = dict(zip(NAMES, inputs, strict=True)) | {"cu_seqlens_q": cu, "softmax_scale": 0.3}
    wrong = {
        "q": [inputs[0].half(), inputs[0][0], inputs[0][..., 1:], [1.0]],
        "k_nope": [inputs[1].double(), inputs[1][:, :1], inputs[1].flatten()],
        "k_pe": [inputs[2].bfloat16(), inputs[2][1:], inputs[2][:, None]],
        "v": [inputs[3].double(), inputs[3][1:], inputs[3][:, :1]],
        "cu_seqlens_q": [cu.long(), cu[:0], cu[None], bounds([5, 5]), cu.flip(0), cu + 1],
        "softmax_scale": [float("nan"), -1.0, float("inf")],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ArgumentError, match=rf"^{name}"):
                mla_attention(**(names | {name: value}))
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_k"):
        mla_attention(**names, cu_seqlens_k=bounds([5]))
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_k: must rise from 0 to at most 9 rows"):
        mla_attention(**names, cu_seqlens_k=bounds([5, 40]))
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_k: must be given"):
        mla_attention(**(names | {"q": inputs[0][:4]}))
    out, lse = mla_attention(**names)
    for name, args in {
        "out_a": (out.half(), lse, out, lse),
        "out_b": (out, lse, out[1:], lse),
        "lse_a": (out, lse.double(), out, lse),
        "lse_b": (out, lse, out, lse[1:]),
    }.items():
        with pytest.raises(ArgumentError, match=f"^{name}"):
            merge_lse(*args)
