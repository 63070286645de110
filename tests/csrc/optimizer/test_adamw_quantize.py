"""adamw_ with FP8 copies against adamw_, then quantize_128x128 and transpose_128x128: every bit of every array.

The separate passes are what the copies must equal, on the reference; the kernel's own paths choose the cases: types of the
arrays, 16-byte and single accesses, edges of tiles, lists of weights and of other tensors, longer than a table.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError
from deepseek_ops.optimizer import adamw_
from deepseek_ops.quantize import quantize_128x128, transpose_128x128
from tests.csrc.layouts import on
from tests.csrc.optimizer.test_optimizer_kernels import (
    BF16,
    FP32,
    IN_THE_EMULATOR,
    KW,
    Arena,
    backend,  # noqa: F401  (a fixture)
    device_of,
    native_module,
    same,
)

E4M3 = torch.float8_e4m3fn
ABSENT = (None,) * 4
NAMES = ("params", "grads", "exp_avg", "exp_avg_sq", "out")


class Case:
    """A list in an arena of canaries; `wanted`: 0 no copies, 2 of the weight, 4 of its transpose too."""

    def __init__(self, shapes, wanted, grad=FP32, first=BF16, second=BF16, off=(0,) * 5, q_off=0, seed=0):
        g = torch.Generator().manual_seed(seed)
        sizes = [math.prod(s) for s in shapes]
        self.arena = Arena(sum(sizes) * 30 + 1000 * len(shapes) + 4096)
        draw = (torch.randn, torch.randn, torch.randn, torch.rand, torch.randn)
        self.lists = [
            [self.arena.put(d(s, generator=g).to(dtype), shift) for s in shapes]
            for d, dtype, shift in zip(draw, (FP32, grad, first, second, BF16), off, strict=True)
        ]
        self.copies = []
        for shape, parts in zip(shapes, wanted, strict=True):
            if parts == 0:
                self.copies.append(None)
                continue
            *lead, n, k = shape
            tiles = -(-n // 128), -(-k // 128)
            put = [
                self.arena.put(torch.full(s, 0x5B, dtype=torch.uint8), q_off if i % 2 == 0 else 0).view(E4M3)
                if i % 2 == 0
                else self.arena.put(torch.full(s, 123.0))
                for i, s in enumerate(
                    ((*lead, n, k), (*lead, *tiles), (*lead, k, n), (*lead, *tiles[::-1]))[:parts]
                )
            ]
            self.copies.append((*put, None, None) if parts == 2 else tuple(put))

    def separately(self, pow2, **kw):
        """The passes that the fused one replaces, on copies of the lists."""
        lists = [[t.clone() for t in ts] for ts in self.lists]
        with deepseek_ops.backend("reference"):
            adamw_(*lists[:4], out=lists[4], **{**KW, **kw})
            copies = []
            for param, parts in zip(lists[0], self.copies, strict=True):
                if parts is None:
                    copies.append(None)
                    continue
                made = quantize_128x128(param, pow2=pow2)
                copies.append((*made, *(transpose_128x128(*made) if parts[2] is not None else (None, None))))
        return lists, copies

    def check(self, backend, pow2=False, **kw):  # noqa: F811
        want, want_copies = self.separately(pow2, **kw)

        def there(t):  # itself on a CPU, where the canaries are
            return t.to(device_of(backend)) if isinstance(t, torch.Tensor) else t

        lists = [[there(t) for t in ts] for ts in self.lists]
        copies = [c and tuple(there(t) for t in c) for c in self.copies]
        kw = {name: there(value) for name, value in kw.items()}
        with deepseek_ops.backend(backend):
            adamw_(*lists[:4], out=lists[4], fp8_out=copies, fp8_pow2=pow2, **{**KW, **kw})
        assert self.arena.intact()
        for name, a, b in zip(NAMES, lists, want, strict=True):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                assert same(x.cpu(), y), f"{name}[{i}] differs"
        for i, (a, b) in enumerate(zip(copies, want_copies, strict=True)):
            for name, x, y in zip(("q", "scale", "q_t", "scale_t"), a or ABSENT, b or ABSENT, strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(bits(x.cpu()), bits(y)), f"{name} of {i} differs"
        return lists, copies


def bits(x):
    return x.view(torch.uint8) if x.dtype == E4M3 else x.view(torch.int32)


MIXED = [
    (2, 130, 144),
    (7,),
    (128, 128),
    (576, 48),
    (3, 5),
    (1, 1),
    (0, 16),
    (16, 0),
    (),
    (129, 16),
    (200, 20),
]
WANTED = [4, 0, 4, 2, 0, 4, 4, 2, 0, 2, 4]


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("second", [BF16, FP32], ids=["v16", "v32"])
@pytest.mark.parametrize("first", [BF16, FP32], ids=["m16", "m32"])
@pytest.mark.parametrize("grad", [FP32, BF16], ids=["g32", "g16"])
def test_every_mixture_of_types(backend, grad, first, second, stochastic):  # noqa: F811
    case = Case(MIXED, WANTED, grad, first, second)
    decay = [0.1 * (i % 3) for i in range(len(MIXED))]
    case.check(
        backend,
        pow2=stochastic,
        stochastic_rounding=stochastic,
        seed=2**40 + 5,
        weight_decay=decay,
        first_index=2**32 - 30_000,
    )


@pytest.mark.parametrize("which", range(6), ids=[*NAMES, "q"])
def test_any_alignment(backend, which):  # noqa: F811
    off = [int(which == i) for i in range(5)]
    Case([(130, 48), (16, 144)], [4, 2], off=off, q_off=int(which == 5)).check(
        backend, stochastic_rounding=True
    )


@pytest.mark.parametrize("shape", [(1, 16), (127, 128), (128, 129), (16, 4), (5, 1, 300), (3, 257, 16)])
def test_edges_of_tiles(backend, shape):  # noqa: F811
    Case([shape, shape], [4, 2]).check(backend)


@pytest.mark.parametrize("eps", [1e-8, 1e-60], ids=["eps", "eps_below_fp32"])
def test_what_does_not_exist_counts_as_zero(backend, eps):  # noqa: F811
    """Past the edges of a tile the step is not taken: with eps rounded to 0 it would be 0 / 0, and the tile NaN."""
    Case([(130, 21), (16, 144)], [4, 4]).check(backend, eps=eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(256, 256), (250, 250)], ids=["whole", "ragged"])
def test_a_bad_gradient_stays_in_its_tile(backend, bad, shape):  # noqa: F811
    clean = Case([shape], [4])
    clean.check(backend)
    case = Case([shape], [4])
    case.lists[1][0][130, 5] = bad
    lists, [(q, scale, q_t, _)] = case.check(backend)
    q, scale, q_t = (t.cpu().float() for t in (q, scale, q_t))
    assert lists[0][0][130, 5].isnan() and q[130, 5].isnan() and q.isnan().sum() == 1
    assert q_t[5, 130].isnan() and scale[1, 0] == 1.0
    if backend != "cuda":
        others = torch.ones(2, 2, dtype=torch.bool)
        others[1, 0] = False
        assert torch.equal(scale[others], clean.copies[0][1][others])
        assert torch.equal(q[:128], clean.copies[0][0][:128].float())
        assert torch.equal(q[128:, 128:], clean.copies[0][0][128:, 128:].float())


def test_masters_that_are_not_finite(backend):  # noqa: F811
    case = Case([(130, 144)], [4])
    case.lists[0][0][0, 3], case.lists[0][0][129, 143] = math.inf, -math.inf
    _, [(q, *_)] = case.check(backend)
    assert q.cpu().float().isnan().sum() == 2
    case = Case([(130, 144)], [4])
    for ts in case.lists[:4]:
        ts[0].zero_()
    _, [(q, scale, *_)] = case.check(backend)  # zeros: scale 1
    assert (q.cpu().float() == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.37])
def test_a_skipped_step_leaves_copies_of_the_old_masters(backend, scale):  # noqa: F811
    case = Case([(130, 144), (9,), (16, 20)], [4, 0, 2])
    before = [t.clone() for t in case.lists[0]]
    lists, _ = case.check(backend, grad_scale=torch.tensor(scale))
    assert all(same(a, b.cpu()) for a, b in zip(before, lists[0], strict=True)) == (not math.isfinite(scale))


def test_a_list_longer_than_a_launch(backend):  # noqa: F811
    """More weights than two tables hold, other tensors between them; noise counts through all of them."""
    shapes = [(1 + i % 3, 16 + i % 2) if i % 4 else (i,) for i in range(110)]
    wanted = [2 + 2 * (i % 2) if i % 4 else 0 for i in range(110)]
    Case(shapes, wanted).check(
        backend,
        stochastic_rounding=True,
        first_index=2**33 - 500,
        weight_decay=[0.01 * i for i in range(110)],
    )


def test_strides(backend):  # noqa: F811
    case = Case([(144, 130)], [4])
    lists, [want] = case.separately(False)
    turned = [[on(t.mT.contiguous().mT, device_of(backend)) for t in ts] for ts in case.lists]
    made = [on(torch.empty_like(t).mT.contiguous().mT, device_of(backend)) for t in want]
    versions = [t._version for t in made]
    with deepseek_ops.backend(backend):
        adamw_(*turned[:4], out=turned[4], fp8_out=[tuple(made)], **KW)
    assert all(
        same(a.cpu(), b) for x, y in zip(turned, lists, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert all(
        torch.equal(a.cpu().contiguous().view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(made, want, strict=True)
    )
    assert all(t._version > v for t, v in zip(made, versions, strict=True))


@IN_THE_EMULATOR
@pytest.mark.parametrize("asynchrony", ["eager", "random", "lazy"])
@pytest.mark.parametrize("schedule", ["fifo", "random", "starve", "pct"])
def test_schedules(backend, schedule, asynchrony):  # noqa: F811
    for seed in range(2):
        with deepseek_ops.emulation(
            seed=seed, schedule=schedule, asynchrony=asynchrony, resident_clusters=1 + seed
        ):
            Case([(130, 32), (10,), (20, 20)], [4, 0, 4]).check(backend)


# --- arguments ------------------------------------------------------------------------------------------------------


def copies_of(w):
    made = quantize_128x128(w)
    return (*made, *transpose_128x128(*made))


W = torch.ones(4, 8)
BAD_COPIES = [
    (lambda c: [c, c], "fp8_out: must have 1 entries, as params; got 2"),
    (lambda c: [c[:2]], "fp8_out[0]: must be q, scale, q_t, scale_t; got 2 entries"),
    (lambda c: [(*c[:3], None)], "fp8_out[0]: must have both q_t and scale_t or neither; got one of them"),
    (lambda c: [(c[0].float(), *c[1:])], "fp8_out[0].q: must"),
    (lambda c: [(c[2], *c[1:])], "fp8_out[0].q: must"),
    (lambda c: [(c[0], c[1][0], *c[2:])], "fp8_out[0].scale: must"),
    (lambda c: [(*c[:2], c[0], c[3])], "fp8_out[0].q_t: must"),
    (lambda c: [(*c[:3], c[3].double())], "fp8_out[0].scale_t: must"),
]


@pytest.mark.parametrize(("change", "message"), BAD_COPIES, ids=[m[:40] for _, m in BAD_COPIES])
def test_the_function_checks_copies_before_any_change(change, message):
    lists = [[torch.ones(4, 8)] for _ in range(4)]
    with pytest.raises(ArgumentError) as error:
        adamw_(*lists, fp8_out=change(copies_of(W)), **KW)
    assert str(error.value).startswith(message) and (lists[0][0] == 1).all()
    with pytest.raises(
        ArgumentError, match="params\\[0\\]: must have 2 or 3 dimensions to be quantised; got 1"
    ):
        adamw_(*([torch.ones(32)] for _ in range(4)), fp8_out=[copies_of(W)], **KW)


NONE = [torch.empty(0, dtype=E4M3)], [torch.empty(0)]
BAD_NATIVE = [
    ({"q": []}, "q: must have as many tensors as params; got 0"),
    ({"q": [torch.ones(4, 8)]}, "q[0]: must be float8_e4m3fn; got float32"),
    ({"q": [torch.empty(8, 4, dtype=E4M3)]}, "q[0]: must have shape [4, 8]; got shape [8, 4]"),
    ({"scale": [torch.empty(2, 1)]}, "scale[0]: must have shape [1, 1]; got shape [2, 1]"),
    ({"scale": NONE[1]}, "scale[0]: must have shape [1, 1]"),
    ({"q_t": [torch.empty(4, 8, dtype=E4M3)]}, "q_t[0]: must have shape [8, 4]; got shape [4, 8]"),
    ({"scale_t": NONE[1]}, "scale_t[0]: must have shape [1, 1]"),
    ({"q": [torch.empty(8, 4, dtype=E4M3).mT]}, "q[0]: must be contiguous"),
    ({"step": 0}, "step: must be at least 1; got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NATIVE, ids=[m[:40] for _, m in BAD_NATIVE])
def test_the_native_step_checks_copies(change, message):
    native = native_module()
    arguments = {
        **{name: [torch.ones(4, 8)] for name in NAMES[:4]},
        "out": [],
        **dict(zip(("q", "scale", "q_t", "scale_t"), ([t] for t in copies_of(W)), strict=True)),
        "weight_decay": [0.0], "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step": 1, "grad_scale": 1.0,
        "grad_scale_tensor": None, "stochastic_rounding": False, "seed": 0, "first_index": 0, "pow2": False,
    }  # fmt: skip
    arguments.update(change)
    with pytest.raises(ArgumentError) as error:
        native.adamw_quantize_(*arguments.values())
    assert str(error.value).startswith(message)
