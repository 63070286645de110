"""The optimizer's kernels against the reference, bit for bit, one case for every path through them.

The public tests (tests/test_optimizer.py) hold every backend to scalar oracles; here cases are chosen by what the
kernels do: types of the arrays, 16-byte and single accesses, tails, lists longer than a launch's table.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError
from deepseek_ops._registry import absent_reason
from deepseek_ops.optimizer import adamw_, clip_grad_norm
from tests.csrc.layouts import on

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
KW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
CANARY = 0x5A
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 2047, 2048, 2049, 5000]  # groups of 4, halves of a chunk of 2048, chunks


@pytest.fixture(params=("emulated", "checked", "cuda"))
def backend(request):
    reason = absent_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param} is absent: {reason}")
    return request.param


IN_THE_EMULATOR = pytest.mark.parametrize("backend", ["emulated", "checked"], indirect=True)  # not on silicon


def device_of(backend):
    return "cuda" if backend == "cuda" else "cpu"


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=77.0), b.nan_to_num(nan=77.0))


class Arena:
    """Tensors cut from one buffer of canaries, each at a chosen distance from a multiple of 16 bytes."""

    def __init__(self, size=1 << 20):
        self.bytes = torch.full((size,), CANARY, dtype=torch.uint8)
        self.free = torch.ones(size, dtype=torch.bool)
        self.at = 64 - self.bytes.data_ptr() % 64

    def put(self, x, off=0):
        size = x.element_size()
        self.at = -(-self.at // 16) * 16 + 16 + off * size
        start, self.at = self.at, self.at + x.numel() * size
        assert self.at < self.bytes.numel()
        view = self.bytes[start : self.at].view(x.dtype).view(x.shape)
        view.copy_(x)
        self.free[start : self.at] = False
        return view

    def intact(self):
        return bool((self.bytes[self.free] == CANARY).all())


def lists(sizes, grad=FP32, first=BF16, second=BF16, off=(0, 0, 0, 0, 0), seed=0):
    """params, grads, exp_avg, exp_avg_sq, out in an arena; `off`: elements off 16 bytes, of each list."""
    g = torch.Generator().manual_seed(seed)
    arena = Arena(sum(sizes) * 20 + 200 * len(sizes) + 4096)
    made = []
    for dtype, shift, draw in zip(
        (FP32, grad, first, second, BF16), off, ("n", "n", "n", "u", "n"), strict=True
    ):
        values = [torch.randn(n, generator=g) if draw == "n" else torch.rand(n, generator=g) for n in sizes]
        made.append([arena.put(v.to(dtype), shift) for v in values])
    return arena, made


def run(backend, made, with_out=True, **kw):
    """Copies of the lists after one step; those given are not touched."""
    moved = [[t.to(device_of(backend), copy=True) for t in ts] for ts in made]
    step(backend, moved, with_out, **kw)
    return [[t.cpu() for t in ts] for ts in moved]


def step(backend, made, with_out=True, **kw):
    with deepseek_ops.backend(backend):
        adamw_(*made[:4], out=made[4] if with_out else None, **{**KW, **kw})


def check(backend, arena, made, **kw):
    want = run("reference", made, **kw)
    if backend == "cuda":
        got = run(backend, made, **kw)
    else:  # in place, where the canaries are
        got = made
        step(backend, made, **kw)
        assert arena.intact()
    for name, a, b in zip(("params", "grads", "exp_avg", "exp_avg_sq", "out"), got, want, strict=True):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert same(x, y), f"{name}[{i}] differs"


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("second", [BF16, FP32], ids=["v16", "v32"])
@pytest.mark.parametrize("first", [BF16, FP32], ids=["m16", "m32"])
@pytest.mark.parametrize("grad", [FP32, BF16], ids=["g32", "g16"])
def test_every_mixture_of_types(backend, grad, first, second, stochastic):
    arena, made = lists(SIZES, grad, first, second)
    decay = [0.1 * (i % 3) for i in range(len(SIZES))]
    check(backend, arena, made, stochastic_rounding=stochastic, seed=2**40 + 5, weight_decay=decay)


@pytest.mark.parametrize("which", range(5), ids=["param", "grad", "exp_avg", "exp_avg_sq", "out"])
def test_any_alignment(backend, which):
    off = [0] * 5
    off[which] = 1
    arena, made = lists([7, 2050], off=off)
    check(backend, arena, made, stochastic_rounding=True)
    arena, made = lists([7, 2050], BF16, FP32, FP32, off=off)
    check(backend, arena, made)


@pytest.mark.parametrize("scale", [0.37, torch.tensor(0.37), torch.tensor(math.nan), torch.tensor(-math.inf)])
def test_scale_by_value_and_from_the_device(backend, scale):
    if backend == "cuda" and isinstance(scale, torch.Tensor):
        scale = scale.cuda()
    arena, made = lists([5000, 3])
    before = [[t.clone() for t in ts] for ts in made]
    if isinstance(scale, torch.Tensor) and not math.isfinite(float(scale)):
        step(
            backend, made if backend != "cuda" else [[t.cuda() for t in ts] for ts in made], grad_scale=scale
        )
        assert arena.intact() and all(
            same(a, b) for x, y in zip(made, before, strict=True) for a, b in zip(x, y, strict=True)
        )
    else:
        check(backend, arena, made, grad_scale=float(scale), with_out=False)


def test_a_list_longer_than_a_launch(backend):
    """More tensors than two tables hold; noise goes on through all of them."""
    arena, made = lists([(i * 37) % 23 for i in range(150)] + [2049])
    check(
        backend,
        arena,
        made,
        stochastic_rounding=True,
        first_index=2**33 - 500,
        weight_decay=[0.01 * i for i in range(151)],
    )


@pytest.mark.parametrize("first_index", [2**32 - 3, 2**32 - 1026, 2**32 - 1024, 2**45])
def test_noise_across_multiples_of_two_to_the_32(backend, first_index):
    arena, made = lists([2050, 9])
    check(backend, arena, made, stochastic_rounding=True, first_index=first_index, seed=2**63 - 1, step=2**35)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_stays_in_its_element(backend, bad):
    arena, made = lists([2050])
    clean = run(backend, made)
    made[1][0][1025] = bad
    dirty = run(backend, made)
    others = torch.arange(2050) != 1025
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[0][others], b[0][others])
    assert dirty[0][0][1025].isnan() and arena.intact()
    check(backend, arena, made)


def test_a_decay_of_zero_is_not_added(backend):
    arena, made = lists([8, 8])
    made[0][0][3] = made[0][1][3] = math.inf
    for ts in made[1:4]:
        for t in ts:
            t.zero_()
    check(backend, arena, made, weight_decay=[0.0, 0.1])
    if backend != "cuda":
        assert made[0][0][3] == math.inf and made[0][1][3].isnan()


def test_strides(backend):
    """Tensors that are not dense are copied in and out by the op."""
    _, made = lists([60] * 5)
    turned = [[t.view(6, 10).T if i % 2 else t.view(6, 10)[:, ::2] for i, t in enumerate(ts)] for ts in made]
    want = [[t.clone(memory_format=torch.contiguous_format) for t in ts] for ts in turned]
    step("reference", want, stochastic_rounding=True)
    turned = [[on(t, device_of(backend)) for t in ts] for ts in turned]
    versions = [t._version for t in turned[0]]
    step(backend, turned, stochastic_rounding=True)
    assert all(same(a.cpu(), b) for x, y in zip(turned, want, strict=True) for a, b in zip(x, y, strict=True))
    assert all(t._version > v for t, v in zip(turned[0], versions, strict=True))


@IN_THE_EMULATOR
@pytest.mark.parametrize("asynchrony", ["eager", "random", "lazy"])
@pytest.mark.parametrize("schedule", ["fifo", "random", "starve", "pct"])
def test_schedules(backend, schedule, asynchrony):
    for seed in range(2):
        with deepseek_ops.emulation(
            seed=seed, schedule=schedule, asynchrony=asynchrony, resident_clusters=2 + seed
        ):
            arena, made = lists([2049, 10, 4100])
            check(backend, arena, made, stochastic_rounding=True)
            grads = [
                torch.randn(9000, generator=torch.Generator().manual_seed(seed)),
                torch.ones(70, dtype=BF16),
            ]
            norms_agree(backend, grads)


# --- the norm -------------------------------------------------------------------------------------------------------


def norms_agree(backend, grads, max_norm=1.0):
    with deepseek_ops.backend("reference"):
        want = clip_grad_norm(grads, max_norm)
    moved = [g.cuda() for g in grads] if backend == "cuda" else grads
    before = [g.clone() for g in grads]
    with deepseek_ops.backend(backend):
        got = clip_grad_norm(moved, max_norm)
    assert all(same(a.cpu(), b) for a, b in zip(got, want, strict=True)), (got, want)
    assert all(same(a.cpu(), b) for a, b in zip(moved, before, strict=True))
    return got


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("off", [0, 1])
def test_norm_of_every_type_and_alignment(backend, dtype, off):
    arena = Arena()
    g = torch.Generator().manual_seed(0)
    sizes = [0, 1, 2, 7, 8, 2047, 4096, 8193, 20_000]
    grads = [arena.put(torch.randn(n, generator=g).to(dtype), off) for n in sizes]
    aligned = [x.clone() for x in grads]
    assert norms_agree(backend, grads, 5.0) == norms_agree(backend, aligned, 5.0)
    assert arena.intact()


def test_norm_of_mixed_and_long_lists(backend):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(i % 41, generator=g).to((FP32, BF16, FP64)[i % 3]) for i in range(160)]
    grads[150] = torch.randn(70_000, generator=g)  # the two launches have unequal numbers of chunks
    norms_agree(backend, grads)
    norms_agree(backend, grads[::-1], math.inf)
    norms_agree(backend, [torch.zeros(0), torch.zeros(0, dtype=BF16)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_norm_of_bad_gradients(backend, bad):
    grads = [torch.randn(5000, generator=torch.Generator().manual_seed(1)), torch.full((9,), bad)]
    norm, scale = norms_agree(backend, grads)
    assert not math.isfinite(float(norm)) and math.isnan(float(scale))


def test_norm_is_the_same_in_every_run(backend):
    grads = [torch.randn(50_001, generator=torch.Generator().manual_seed(2))]
    got = {tuple(float(x) for x in norms_agree(backend, grads)) for _ in range(4)}
    assert len(got) == 1


# --- what the native functions refuse -------------------------------------------------------------------------------

ONE = torch.ones(4)
BAD = [
    ({"grads": [ONE.double()]}, "grads[0]: must be float32 or bfloat16; got float64"),
    ({"params": [ONE.bfloat16()]}, "params[0]: must be float32; got bfloat16"),
    ({"exp_avg": [torch.ones(5)]}, "exp_avg[0]: must have the shape of its parameter; got shape [5]"),
    ({"exp_avg_sq": [torch.ones(8)[::2]]}, "exp_avg_sq[0]: must be contiguous"),
    ({"out": [torch.ones(4)]}, "out[0]: must be bfloat16; got float32"),
    ({"out": [torch.ones(4, dtype=BF16)] * 2}, "out["),
    ({"grads": []}, "params: must have as many tensors as grads, exp_avg and exp_avg_sq; got 1"),
    ({"weight_decay": []}, "weight_decay: must have as many numbers as params; got 0"),
    ({"step": 0}, "step: must be at least 1; got 0"),
    ({"first_index": -1}, "first_index: must not be negative; got -1"),
    ({"grad_scale_tensor": torch.ones(1)}, "grad_scale_tensor: must have shape []; got shape [1]"),
    ({"grad_scale_tensor": torch.ones((), dtype=FP64)}, "grad_scale_tensor: must be float32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_the_native_step_checks_its_arguments(change, message):
    native = native_module()
    arguments = {
        **{name: [torch.ones(4)] for name in ("params", "grads", "exp_avg", "exp_avg_sq")},
        "out": [],
        "weight_decay": [0.0],
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "step": 1,
        "grad_scale": 1.0,
        "grad_scale_tensor": None,
        "stochastic_rounding": False,
        "seed": 0,
        "first_index": 0,
    }
    arguments.update(change)
    with pytest.raises(ArgumentError) as error:
        native.adamw_(*arguments.values())
    assert str(error.value).startswith(message)


def test_the_native_norm_checks_its_arguments():
    native, room, scalars = native_module(), torch.empty(8192, dtype=FP64), [torch.empty(()), torch.empty(())]
    for arguments, message in (
        (
            ([ONE.half()], 1.0, *scalars, room),
            "grads[0]: must be float32 or bfloat16 or float64; got float16",
        ),
        (([torch.ones(8)[::2]], 1.0, *scalars, room), "grads[0]: must be contiguous"),
        (([ONE], 0.0, *scalars, room), "max_norm: must be positive; got 0"),
        (([ONE], 1.0, *scalars, room[1:]), "partials: must have shape [8192]; got shape [8191]"),
        (([ONE], 1.0, torch.empty(1), scalars[1], room), "norm: must have shape []; got shape [1]"),
    ):
        with pytest.raises(ArgumentError) as error:
            native.clip_grad_norm(*arguments)
        assert str(error.value).startswith(message)


def native_module():
    reason = absent_reason("emulated")
    if reason:
        pytest.skip(f"backend emulated is absent: {reason}")
    import importlib

    return importlib.import_module("deepseek_ops._native.emulated")
