"""AdamW and gradient clipping against scalar oracles, fp64 and torch.optim, on every backend."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepseek_ops.optimizer as module
from deepseek_ops import ArgumentError
from deepseek_ops.optimizer import adamw_, clip_grad_norm
from deepseek_ops.quantize import quantize_128x128, transpose_128x128
from deepseek_ops.reference import optimizer as reference

SHAPES = [(7,), (3, 5), (), (2, 0), (4, 3, 2)]
KW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    """params, grads, exp_avg, exp_avg_sq with moments as after a few steps."""
    g = torch.Generator().manual_seed(seed)
    params, grads, first = ([torch.randn(s, generator=g) for s in shapes] for _ in range(3))
    second = [torch.rand(s, generator=g) for s in shapes]
    return params, grads, [m.to(dtype) for m in first], [v.to(dtype) for v in second]


def clone(lists):
    return [[t.clone() for t in ts] for ts in lists]


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def scalar_adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, scale=1.0, number=float):
    """The textbook step on Python or numpy numbers, one rounding per operator of `number`."""
    n = number
    g = n(g) * n(scale)
    m = n(beta1) * n(m) + n(1 - beta1) * g
    v = n(beta2) * n(v) + n(1 - beta2) * (g * g)
    denominator = n(math.sqrt(v)) if n is float else np.sqrt(v)
    denominator = denominator * n(1 / math.sqrt(1 - beta2**step)) + n(eps)
    update = m / denominator * n(lr / (1 - beta1**step)) + n(lr * weight_decay) * n(p)
    return n(p) - update, m, v


def rne_bf16(x):
    """fp32 -> bf16 -> fp32 by integer arithmetic."""
    bits = int(np.float32(x).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


@pytest.mark.parametrize("step", [1, 2, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_follows_the_stated_formula(dtype, step, backend_name):
    state = make(dtype=dtype)
    state[1][0], state[1][4] = state[1][0].bfloat16(), state[1][4].bfloat16()  # gradients of either type
    params, grads, first, second = clone(state)
    out = [p.bfloat16() for p in params]
    adamw_(params, grads, first, second, step=step, out=out, grad_scale=torch.tensor(0.37), **KW)
    keep = (lambda x: x) if dtype == torch.float32 else rne_bf16
    for i in range(len(SHAPES)):
        old = [t[i].float().flatten().tolist() for t in state]
        new = zip(*(t[i].float().flatten().tolist() for t in (params, first, second, out)), strict=True)
        for p, g, m, v, (got_p, got_m, got_v, got_out) in zip(*old, new, strict=True):
            want = scalar_adamw(p, g, m, v, step, **KW, scale=0.37, number=np.float32)
            assert got_p == want[0] and got_m == keep(want[1]) and got_v == keep(want[2])
            assert got_out == rne_bf16(want[0])
    assert same(grads, state[1])


@given(
    p=st.floats(-10, 10),
    g=st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-12),
    m=st.floats(-10, 10),
    v=st.floats(0, 100),
    step=st.integers(1, 10**6),
    decay=st.floats(0, 1),
)
def test_close_to_fp64(p, g, m, v, step, decay, backend_name):
    tensors = [torch.tensor([x]) for x in (p, g, m, v)]
    exact = [float(t) for t in tensors]  # what the fp32 inputs are
    kw = {**KW, "weight_decay": decay}
    adamw_(*([t] for t in tensors), step=step, **kw)
    want_p, want_m, want_v = scalar_adamw(*exact, step, **kw)
    size = abs(exact[0]) + abs(want_p)
    assert float(tensors[0]) == pytest.approx(want_p, rel=1e-6, abs=3e-7 * size + 1e-30)
    assert float(tensors[2]) == pytest.approx(want_m, rel=1e-6, abs=1e-6 * abs(exact[2]) + 1e-30)
    assert float(tensors[3]) == pytest.approx(want_v, rel=1e-6, abs=1e-30)


def test_fifty_steps_agree_with_torch_optim(backend_name):
    params, *_ = make()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=KW["lr"], betas=(0.9, 0.95), eps=1e-8)
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    g = torch.Generator().manual_seed(1)
    for step in range(1, 51):
        grads = [torch.randn(p.shape, generator=g) for p in params]
        norm, scale = clip_grad_norm(grads, 1.0)
        for q, grad in zip(theirs, grads, strict=True):
            q.grad = grad.clone()
        assert float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)) == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
        decays = [0.1, 0.1, 0.0, 0.0, 0.0]
        adamw_(params, grads, first, second, step=step, grad_scale=scale, **{**KW, "weight_decay": decays})
    for mine, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-6)


def test_tiny_weight_decay_is_not_lost_in_rounding(backend_name):
    """Report's last phase: lr 7.3e-6 with decay 0.1 is 7.3e-7 per step, finer than fp32 just below one."""
    p = torch.ones(1)
    zero = torch.zeros(1)
    for step in range(1, 1001):
        adamw_([p], [zero], [zero.clone()], [zero.clone()], lr=7.3e-6, weight_decay=0.1, step=step)
    assert 1 - float(p) == pytest.approx(7.3e-4, rel=0.03)


def test_a_zero_gradient_with_zero_moments_only_decays(backend_name):
    p = torch.tensor([2.0])
    zero = torch.zeros(1)
    adamw_([p], [zero], [zero.clone()], [zero.clone()], step=1, **KW)
    assert float(p) == np.float32(2.0) - np.float32(1e-3) * np.float32(2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_change_nothing(bad, backend_name):
    state = make(dtype=torch.bfloat16)
    params, grads, first, second = clone(state)
    grads[1][0, 3] = bad
    out = [p.bfloat16() for p in params]
    norm, scale = clip_grad_norm(grads, 1.0)
    assert not math.isfinite(float(norm)) and math.isnan(float(scale))
    before = clone([out])[0]
    adamw_(params, grads, first, second, step=1, grad_scale=scale, out=out, **KW)
    assert same(params, state[0]) and same(first, state[2]) and same(second, state[3]) and same(out, before)


def test_layout_and_partition_do_not_matter(monkeypatch, backend_name):
    """Strided tensors, one flat tensor, small chunks: always the same bits, also under stochastic rounding."""
    shape = (6, 10)
    state = make([shape], dtype=torch.bfloat16)

    def run(transform, chunk, kw=None):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        lists = [transform(ts[0].clone()) for ts in state]
        out = transform(torch.zeros(shape, dtype=torch.bfloat16))
        adamw_(*lists, step=3, out=out, stochastic_rounding=True, seed=5, **KW, **(kw or {}))
        return [torch.cat([t.reshape(-1) for t in ts]) for ts in (*lists, out)]

    want = run(lambda t: [t], 1 << 16)
    assert same(want, run(lambda t: [t], 7))
    assert same(want, run(lambda t: [t.view(-1)], 1 << 16))
    assert same(want, run(lambda t: [t[:1], t[1:4], t[4:]], 11))
    assert same(want, run(lambda t: [t.T.contiguous().T], 13))
    shifted = run(lambda t: [t], 1 << 16, {"first_index": 1})
    assert torch.equal(shifted[0], want[0]) and not torch.equal(shifted[2], want[2])
    # A shard that knows its offset draws the noise of the whole.
    lists = [[ts[0].clone()[2:]] for ts in state]
    adamw_(*lists, step=3, stochastic_rounding=True, seed=5, first_index=20, **KW)
    assert torch.equal(lists[2][0].reshape(-1), want[2][20:])


def scalar_noise(seed, step, index):
    """The documented hash, in Python integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    key = 0
    for word in (seed % 2**32, seed >> 32, step % 2**32, step >> 32, index >> 32):
        key = mix((key ^ word) * 0x9E3779B9 % 2**32)
    h = mix(((index % 2**32) * 0x9E3779B9 + key) % 2**32)
    return h & 0xFFFF, h >> 16


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(1, 2**40),
    index=st.one_of(st.integers(0, 2**45), st.integers(2**32 - 20, 2**32 + 5)),
)
def test_noise_is_the_documented_hash_and_rounds_to_a_neighbour(seed, step, index, backend_name):
    params, grads, first, second = make([(12,)], dtype=torch.bfloat16)
    exact = clone([params, grads, [first[0].float()], [second[0].float()]])
    adamw_(
        params, grads, first, second, step=step, stochastic_rounding=True, seed=seed, first_index=index, **KW
    )
    adamw_(*exact, step=step, **KW)
    assert same(params, exact[0])
    for i in range(12):
        for moment, value, noise in zip(
            (first, second), exact[2:], scalar_noise(seed, step, index + i), strict=True
        ):
            bits = int(np.float32(float(value[0][i])).view(np.uint32))
            want = np.uint32((bits + noise) & 0xFFFF0000).view(np.float32)
            assert float(moment[0][i]) == want


def test_stochastic_rounding_is_unbiased_and_independent():
    n = 1 << 16
    for value in (1.001, -0.3003, 1e-30):
        x = torch.full((n,), value)
        low, high = reference.random_bits(11, 7, 0, n, x.device)
        for noise in (low, high):
            assert int(noise.min()) >= 0 and int(noise.max()) < 1 << 16
            mean = float(reference.stochastic_round(x, noise).double().mean())
            ulp = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
            assert abs(mean - float(x[0])) < 4 * ulp * 0.5 / math.sqrt(n)  # 4 sigma of the widest Bernoulli
        other = reference.random_bits(11, 8, 0, n, x.device)[0]
        for a, b in ((low, high), (low, other), (low[1:], low[:-1])):
            a, b = a.double() - 32767.5, b.double() - 32767.5
            assert abs(float((a * b).mean() / (a.std() * b.std()))) < 4 / math.sqrt(n)


def test_stochastic_rounding_keeps_what_is_exact():
    x = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan])
    got = reference.stochastic_round(x, torch.full((6,), 0xFFFF, dtype=torch.int32))
    assert torch.equal(got[:5], x[:5].bfloat16()) and math.isnan(float(got[5]))
    assert math.copysign(1, float(got[1])) == -1
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 0xFFFF):
        assert reference.stochastic_round(payloads, torch.full((3,), noise, dtype=torch.int32)).isnan().all()


def test_bf16_second_moment_stalls_without_stochastic_rounding(backend_name):
    """Why the option exists: at beta2 0.999 a step moves v by less than half a bf16 ulp."""
    n, steps, ends = 512, 400, []
    for stochastic in (False, True):
        p, g = torch.zeros(n), torch.full((n,), 1.1)
        first, second = torch.zeros(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
        for step in range(1, steps + 1):
            adamw_(
                [p], [g], [first], [second], lr=0.0, beta2=0.999, step=step, stochastic_rounding=stochastic
            )
        ends.append(float(second.double().mean()))
    want = 1.21 + (1 - 1.21) * 0.999**steps
    assert ends[0] == 1.0 and ends[1] == pytest.approx(want, rel=5e-3)


@given(
    values=st.lists(st.floats(-(2.0**66), 2.0**66, width=32), max_size=30),
    max_norm=st.floats(1e-3, 1e3),
)
def test_norm_is_the_fp64_norm(values, max_norm, backend_name):
    grads = [torch.tensor(values[:7]), torch.tensor(values[7:]).reshape(1, -1)]
    norm, scale = clip_grad_norm(grads, max_norm)
    exact = float(np.float32(math.sqrt(math.fsum(float(np.float32(v)) ** 2 for v in values))))
    assert float(norm) == pytest.approx(exact, rel=1.2e-7)
    assert float(scale) == (1.0 if float(norm) <= max_norm else np.float32(max_norm) / np.float32(norm))
    assert norm.dtype == scale.dtype == torch.float32 and norm.shape == scale.shape == ()


def test_norm_has_one_order_whatever_the_threads(backend_name):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(300_001, generator=g), torch.randn(17, 5, generator=g).T, torch.randn(4, 0)]
    want = clip_grad_norm(grads, 1.0)
    exact = reference._sum_of_squares(grads[0])  # fp64, where a change of order shows
    assert float(want[0]) == pytest.approx(
        math.sqrt(sum(float(x.double().pow(2).sum()) for x in grads)), rel=1e-7
    )
    torch.set_num_threads(3)
    try:
        assert same(want, clip_grad_norm(grads, 1.0))
        assert torch.equal(exact, reference._sum_of_squares(grads[0]))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_leaves_gradients_alone(dtype, backend_name):
    grads = [torch.randn(40_000).to(dtype), torch.randn(3).to(dtype)]
    before = [g.clone() for g in grads]
    norm, _ = clip_grad_norm(grads, 1.0)
    assert same(grads, before)
    assert float(norm) == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in grads)), rel=1e-7
    )


def test_clip_edges(backend_name):
    assert [float(x) for x in clip_grad_norm([], 1.0)] == [0.0, 1.0]
    assert [float(x) for x in clip_grad_norm([torch.zeros(0)], 1.0)] == [0.0, 1.0]
    assert [float(x) for x in clip_grad_norm([torch.tensor([3.0, 4.0])], math.inf)] == [5.0, 1.0]
    assert [float(x) for x in clip_grad_norm([torch.tensor([3.0, 4.0])], 5.0)] == [5.0, 1.0]
    assert float(clip_grad_norm([torch.tensor([1e30, 1e30])], 1.0)[1]) > 0  # squares do not overflow
    assert math.isnan(float(clip_grad_norm([torch.full((4,), 3e38)], 1.0)[1]))  # the norm itself does
    adamw_([], [], [], [], step=1, **KW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr: must be finite and not negative; got -1.0"),
        ({"lr": math.nan}, "lr: "),
        ({"beta1": 1.0}, r"beta1: must be in \[0, 1\); got 1.0"),
        ({"beta2": -0.1}, "beta2: "),
        ({"eps": 0.0}, "eps: must be finite and positive"),
        ({"step": 0}, "step: must be at least 1; got 0"),
        ({"seed": -1}, "seed: "),
        ({"first_index": -1}, "first_index: "),
        ({"weight_decay": [0.1]}, "weight_decay: must have 2 numbers, as params; got 1"),
        ({"weight_decay": [0.1, math.nan]}, r"weight_decay\[1\]: must be finite"),
        ({"grad_scale": math.inf}, "grad_scale: must be finite; got inf"),
        ({"grad_scale": torch.ones(2)}, "grad_scale: must have shape"),
        ({"grad_scale": torch.ones((), dtype=torch.float64)}, "grad_scale: must be float32; got float64"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale: must be on the device of params"),
        ({"out": [torch.zeros(3)]}, "out: must have 2 tensors"),
        ({"out": [torch.zeros(3), torch.zeros(2, 2)]}, r"out\[0\]: must be bfloat16; got float32"),
        ({"grads": [torch.zeros(3)]}, "grads: must have 2 tensors, as params; got 1"),
        (
            {"grads": [torch.zeros(3), torch.zeros(4)]},
            r"grads\[1\]: must have shape \[2, 2\]; got shape \(4,\)",
        ),
        (
            {"exp_avg": [torch.zeros(3).half(), torch.zeros(2, 2)]},
            r"exp_avg\[0\]: must be float32 or bfloat16",
        ),
        ({"exp_avg_sq": [torch.zeros(3), 1.0]}, r"exp_avg_sq\[1\]: must be a torch.Tensor"),
        ({"params": [torch.zeros(3).bfloat16(), torch.zeros(2, 2)]}, r"params\[0\]: must be float32"),
    ],
)
def test_argument_errors_come_before_any_change(change, message, backend_name):
    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    lists = {name: [torch.ones(3), torch.ones(2, 2)] for name in names}
    kw = {**lists, **KW, "step": 1, **change}
    params = kw["params"]
    before = [p.clone() for p in params]
    with pytest.raises(ArgumentError, match=message):
        adamw_(*[kw.pop(n) for n in names], **kw)
    assert same(params, before)


@pytest.mark.parametrize(
    ("grads", "max_norm", "message"),
    [
        ([torch.ones(1)], 0.0, "max_norm: must be positive; got 0.0"),
        ([torch.ones(1)], math.nan, "max_norm: "),
        ([torch.ones(1), torch.ones(1, dtype=torch.int64)], 1.0, r"grads\[1\]: must be float32"),
    ],
)
def test_clip_argument_errors(grads, max_norm, message, backend_name):
    with pytest.raises(ArgumentError, match=message):
        clip_grad_norm(grads, max_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend_name):
    lists = make(dtype=dtype)
    out = [p.bfloat16() for p in lists[0]]
    common = ([0.1] * 5, 1e-2, 0.9, 0.95, 1e-8, 3)
    torch.library.opcheck(module._adamw.raw, (*lists, out, *common, 1.0, torch.tensor(0.5), True, 3, 0))
    torch.library.opcheck(module._adamw.raw, (*clone(lists), [], *common, 0.5, None, False, 0, 0))
    torch.library.opcheck(module._clip_grad_norm.raw, (lists[1], 1.0))


def copies_of(weight):
    made = quantize_128x128(weight)
    return (*made, *transpose_128x128(*made))


def test_opcheck_of_copies(backend_name):
    lists = make([(3, 5), (7,), (2, 4, 3)], dtype=torch.bfloat16)
    copies = module._copies(
        lists[0], [copies_of(lists[0][0]), None, (*copies_of(lists[0][2])[:2], None, None)]
    )
    arguments = [list(part) for part in zip(*copies, strict=True)]
    common = ([0.1] * 3, 1e-2, 0.9, 0.95, 1e-8, 3, 1.0, torch.tensor(0.5), True, 3, 0, True)
    # Without test_schema, which multiplies what the op writes: torch has no product of FP8 tensors.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module._adamw_quantize.raw, (*lists, [], *arguments, *common), test_utils=checks)


def test_copies_are_of_the_new_masters(backend_name):
    """Every list stays what `adamw_` makes of it; copies are those that separate passes make, of old masters in a skip."""
    shapes = [(130, 70), (4,), (3, 20, 33), (1, 1)]
    for scale in (0.7, math.nan):
        fused, plain = make(shapes, torch.bfloat16), make(shapes, torch.bfloat16)
        fp8 = [copies_of(fused[0][0] + 1), None, (*copies_of(fused[0][2] - 1)[:2], None, None), None]
        kw = {**KW, "step": 3, "grad_scale": torch.tensor(scale), "stochastic_rounding": True}
        adamw_(*fused, fp8_out=fp8, fp8_pow2=True, **kw)
        adamw_(*plain, **kw)
        assert all(same(a, b) for a, b in zip(fused, plain, strict=True))
        for i in (0, 2):
            want = quantize_128x128(plain[0][i], pow2=True)
            want = (*want, *transpose_128x128(*want))
            for a, b in zip(fp8[i], want, strict=True):
                assert a is None or (a.dtype == b.dtype and torch.equal(a.float(), b.float()))


def test_compiles(backend_name):
    def train_step(params, grads, first, second, out):
        norm, scale = clip_grad_norm(grads, 1.0)
        adamw_(params, grads, first, second, step=2, grad_scale=scale, out=out, **KW)
        return norm

    state = make([(3, 5), (4,)], dtype=torch.bfloat16)
    state = [*state, [p.bfloat16() for p in state[0]]]
    a, b = clone(state), clone(state)
    norm = train_step(*a)
    compiled = torch.compile(train_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(norm, compiled(*b))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_compiles_with_copies(backend_name):
    def train_step(params, grads, first, second, q, scale, q_t, scale_t):
        copies = [(q, scale, q_t, scale_t), None]
        adamw_(params, grads, first, second, step=2, fp8_out=copies, **KW)

    state = make([(3, 5), (4,)], dtype=torch.bfloat16)
    a, b = ([*clone(state), *(t.clone() for t in copies_of(state[0][0] + 1))] for _ in range(2))
    train_step(*a)
    torch.compile(train_step, fullgraph=True, backend="aot_eager")(*b)
    assert all(same(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(a[4:], b[4:], strict=True))


def test_parameters_that_require_grad_are_updated_without_a_graph(backend_name):
    p = torch.nn.Parameter(torch.ones(2))
    (p * p).sum().backward()
    adamw_([p], [p.grad], [torch.zeros(2)], [torch.zeros(2)], step=1, **KW)
    assert p.is_leaf and p.requires_grad and float(p[0].detach()) < 1
