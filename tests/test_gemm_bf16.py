"""bf16 GEMM on kernels: the bits of the modelled tensor core, whatever the strides, groups, knobs and schedule."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, _registry
from deepseek_ops import _gemm_ops as ops
from deepseek_ops._emulation import ASYNCHRONY, SCHEDULES
from deepseek_ops._gemm_checks import BF16_GEMM_TILES
from deepseek_ops._native_arguments import _matrices_for_tma
from deepseek_ops.gemm import gemm, gemm_grouped, gemm_masked, wgrad, wgrad_grouped

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAN = float("nan")
KERNELS = pytest.mark.parametrize("target", ["emulated", "checked"])


@pytest.fixture(autouse=True)
def present(request):
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    reason = target and _registry.absent_reason(target)
    if reason:
        pytest.skip(f"backend {target}: {reason}")


def modelled(function, *args, **kwargs):
    with deepseek_ops.backend("modelled"):
        return function(*args, **kwargs)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bits = torch.int16 if x.dtype == BF16 else torch.int32
    return x.dtype == y.dtype and torch.equal(x.view(bits), y.view(bits))


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory, NaN around them."""
    if how.startswith("transposed "):
        return laid_out(x.mT, how.removeprefix("transposed ")).mT
    *lead, rows, columns = x.shape
    width, first, step = {
        "dense": (columns, 0, 1),
        "padded": (-(-columns // 8) * 8 + 16, 8, 1),
        "odd stride": (columns + 3, 0, 1),
        "odd base": (-(-columns // 8) * 8 + 8, 1, 1),
        "gaps": (2 * columns, 0, 2),
    }[how]
    room = torch.full((*lead, rows, width), NAN, dtype=x.dtype)
    view = room[..., first : first + columns * step : step]
    return view.copy_(x)


LAYOUTS = ["dense", "padded", "odd stride", "odd base", "gaps"]
LAYOUTS += [f"transposed {how}" for how in LAYOUTS]


@pytest.mark.parametrize("how", LAYOUTS)
def test_operands_of_any_strides_give_the_same_result(how, backend_name):
    """Only strides that TMA cannot take are copied: a transposed view is not."""
    torch.manual_seed(0)
    a, b, c = torch.randn(70, 40).to(BF16), torch.randn(3, 24, 40).to(BF16), torch.randn(70, 24).to(BF16)
    offsets, copied = torch.tensor([3, 20, 20, 70], dtype=torch.int32), how.split(" ", 1)[-1]
    want = gemm(a, c.T @ a), gemm_grouped(a, b, offsets), wgrad_grouped(a, c, offsets)
    moved = laid_out(a, how), laid_out(c.T @ a, how), laid_out(b, how), laid_out(c, how)
    assert torch.equal(gemm(moved[0], moved[1]), want[0])
    assert torch.equal(gemm_grouped(moved[0], moved[2], offsets), want[1])
    assert torch.equal(wgrad_grouped(moved[0], moved[3], offsets), want[2])
    read_in_place = _matrices_for_tma(moved[2]) is moved[2]
    assert read_in_place == (
        copied in ("dense", "padded", "transposed dense", "transposed padded") or how == "dense"
    )


def test_expanded_and_overlapping_operands(backend_name):
    torch.manual_seed(0)
    row, long = torch.randn(1, 24).to(BF16), torch.randn(100).to(BF16)
    for x in (
        row.expand(40, 24),
        long.as_strided((10, 24), (8, 1)),
        torch.ones((), dtype=BF16).expand(9, 24),
    ):
        assert torch.equal(gemm(x, row), gemm(x.contiguous(), row))
        assert torch.equal(wgrad(x, x), wgrad(x.contiguous(), x.contiguous()))


SIZES = [0, 1, 2, 7, 8, 31, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257]


def random_call(seed: int):
    """An op, its arguments without the output, and where the output goes: (op, operands, out_shape)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape).to(BF16)

    def place(x):
        return laid_out(x, draw.choice(LAYOUTS))

    m, n, k, groups = (draw.choice(s) for s in (SIZES, SIZES, SIZES, [0, 1, 2, 3, 5]))
    kind = draw.choice(["gemm", "wgrad", "gemm_grouped", "wgrad_grouped", "gemm_masked", "wgrad_masked"])
    if kind == "gemm":
        return kind, (place(matrix(m, k)), place(matrix(n, k))), (m, n)
    if kind == "wgrad":
        return kind, (place(matrix(k, m)), place(matrix(k, n))), (m, n)
    if kind.endswith("grouped"):
        sizes = [draw.choice([0, 0, 1, 5, 63, 64, 65, 130]) for _ in range(groups)]
        bounds = list(itertools.accumulate(sizes, initial=draw.choice([0, 0, 3])))
        rows = bounds[-1] + draw.choice([0, 0, 7])
        a, b = matrix(rows, m), matrix(groups, n, m) if kind == "gemm_grouped" else matrix(rows, n)
        for x in (a,) if kind == "gemm_grouped" else (a, b):
            x[: bounds[0]], x[bounds[-1] :] = NAN, NAN
        shape = (rows, n) if kind == "gemm_grouped" else (groups, m, n)
        return kind, (place(a), place(b), torch.tensor(bounds, dtype=torch.int32)), shape
    longest = draw.choice([0, 1, 5, 64, 70, 140])
    counts = torch.tensor([draw.randint(0, longest) for _ in range(groups)], dtype=torch.int32)
    missing = torch.arange(longest)[None, :] >= counts[:, None]
    a, b = (
        matrix(groups, longest, m),
        matrix(groups, n, m) if kind == "gemm_masked" else matrix(groups, longest, n),
    )
    for x in (a,) if kind == "gemm_masked" else (a, b):
        x[missing] = NAN
    return (
        kind,
        (place(a), place(b), counts),
        (groups, longest, n) if kind == "gemm_masked" else (groups, m, n),
    )


RUNS = [("emulated", seed) for seed in range(120)] + [("checked", seed) for seed in range(0, 120, 3)]


@pytest.mark.parametrize(("target", "seed"), RUNS)
def test_bits_of_random_calls(target, seed):
    """Any op, shape, layout, knob, output and schedule: the bits of the model, and not a byte beside the output."""
    kind, operands, shape = random_call(seed)
    draw = random.Random(seed + 1)
    dtype, knobs = (
        draw.choice([BF16, FP32]),
        (draw.choice([0, 1, 2, 3]), *draw.choice([(0, 0), *BF16_GEMM_TILES])),
    )
    running = {"seed": seed, "asynchrony": draw.choice(ASYNCHRONY), "schedule": draw.choice(SCHEDULES)}
    before = [x.clone() for x in operands]
    if draw.random() < 0.5 or kind == "wgrad_masked":
        want = modelled(getattr(ops, kind), *operands, dtype, *knobs)
        with deepseek_ops.backend(target), deepseek_ops.emulation(**running):
            got = getattr(ops, kind)(*operands, dtype, *knobs)
    else:
        first, width = draw.choice([0, 1, 2, 8]), shape[-1] + draw.choice([8, 9, -shape[-1] % 8 + 8])
        want = torch.randn(*shape[:-1], width).to(dtype)
        got = want.clone()
        last = () if kind in ("gemm_grouped", "gemm_masked") else (draw.random() < 0.5,)
        op = getattr(ops, kind + "_")
        modelled(op, *operands, want[..., first : first + shape[-1]], *last, *knobs)
        with deepseek_ops.backend(target), deepseek_ops.emulation(**running):
            op(*operands, got[..., first : first + shape[-1]], *last, *knobs)
    assert same_bits(got, want)
    assert all(same_bits(x.contiguous(), y) for x, y in zip(operands, before, strict=True) if x.dtype == BF16)


EDGE_M = [1, 2, 7, 63, 64, 65, 127, 128, 129, 255, 257]
EDGE_NK = [(8, 1536), (16, 576), (33, 512), (72, 144), (128, 128), (136, 144), (576, 16), (2112, 64)]


@KERNELS
@pytest.mark.parametrize(("n", "k"), EDGE_NK)
def test_edge_sizes(n, k, target):
    """research/gemm-quant.md 7.4: every M at this N and K, rows of one tall matrix among the others."""
    torch.manual_seed(n)
    a, b = torch.randn(257, k).to(BF16), torch.randn(n, k).to(BF16)
    want = modelled(gemm, a, b, out_dtype=FP32)
    exact = a.double() @ b.double().T
    assert (want.double() - exact).abs().max() <= 2**-22 * 4 * k
    with deepseek_ops.backend(target):
        for m in EDGE_M[n % 2 :: 2] if target == "emulated" else (65,):
            rows = slice(0, m)
            assert same_bits(gemm(a[rows], b, out_dtype=FP32), want[rows])
            assert same_bits(wgrad(a[rows].T, b.T), want[rows].to(BF16))


@pytest.mark.parametrize("tile", [None, *BF16_GEMM_TILES], ids=lambda t: t and f"{t[0]}x{t[1]}")
def test_knobs_change_no_bit(tile, backend_name):
    torch.manual_seed(0)
    a, b = torch.randn(200, 144).to(BF16), torch.randn(264, 144).to(BF16)
    offsets, counts = torch.tensor([0, 70, 70, 144]).int(), torch.tensor([3, 72]).int()
    calls = (
        lambda **knobs: gemm(a, b, **knobs),
        lambda **knobs: wgrad(a.T, b.T, out_dtype=FP32, **knobs),
        lambda **knobs: gemm_grouped(a[:144], b.view(3, 88, 144), offsets, **knobs),
        lambda **knobs: wgrad_grouped(a.T, b.T, offsets, **knobs),
        lambda **knobs: gemm_masked(a[:144].view(2, 72, 144), b.view(2, 132, 144), counts, **knobs),
    )
    for call in calls:
        want = call()
        for num_sms in (0, 1, 3, 1000):
            assert torch.equal(call(num_sms=num_sms, tile=tile), want)


@KERNELS
def test_twenty_runs_of_any_schedule_give_the_same_bits(target):
    torch.manual_seed(0)
    a, b = torch.randn(300, 136).to(BF16), torch.randn(300, 264).to(BF16)
    offsets = torch.tensor([5, 5, 101, 102, 290]).int()
    want = modelled(wgrad_grouped, a, b, offsets)
    with deepseek_ops.backend(target):
        for seed in range(20 if target == "emulated" else 4):
            options = {"schedule": SCHEDULES[seed % 4], "asynchrony": ASYNCHRONY[seed % 3]}
            with deepseek_ops.emulation(seed=seed, sm_count=1 + seed % 5, **options):
                assert same_bits(wgrad_grouped(a, b, offsets), want)


def test_nan_and_infinity_stay_in_their_rows_and_columns(backend_name):
    torch.manual_seed(0)
    a, b = torch.randn(70, 72).to(BF16), torch.randn(136, 72).to(BF16)
    clean = gemm(a, b, out_dtype=FP32)
    a[69, 71], a[3, 0], b[133, 5] = NAN, float("inf"), NAN
    result = gemm(a, b, out_dtype=FP32)
    assert result[69].isnan().all() and not result[3].isfinite().any() and result[:, 133].isnan().all()
    rows, columns = torch.ones(70, dtype=torch.bool), torch.ones(136, dtype=torch.bool)
    rows[[3, 69]], columns[133] = False, False
    assert torch.equal(result[rows][:, columns], clean[rows][:, columns])


def test_zeros_denormals_and_the_range_of_bf16(backend_name):
    tiny, huge = torch.finfo(BF16).smallest_normal, torch.finfo(BF16).max
    a = torch.tensor([[0.0, -0.0], [tiny / 4, 0.0], [huge, huge], [huge, -huge], [1.0, 2**-7]]).to(BF16)
    b = torch.tensor([[1.0, 1.0], [2.0**100, -0.0], [huge, 0.0]]).to(BF16)
    result = gemm(a, b, out_dtype=FP32)
    exact = (a.double() @ b.double().T).float()
    assert torch.equal(result, exact) and not torch.signbit(result[0]).any()


@KERNELS
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_other_operands_name_dtype_and_backend(dtype, target):
    a, b, offsets = (
        torch.ones(8, 8, dtype=dtype),
        torch.ones(1, 8, 8, dtype=dtype),
        torch.tensor([0, 8]).int(),
    )
    name = str(dtype).removeprefix("torch.")
    with deepseek_ops.backend(target):
        for call in (
            lambda: gemm(a, a),
            lambda: wgrad(a, a),
            lambda: gemm_grouped(a, b, offsets),
            lambda: wgrad_grouped(a, a, offsets),
            lambda: gemm_masked(b, b, offsets[1:]),
            lambda: gemm(a, a, out=torch.empty(8, 8, dtype=dtype)),
        ):
            with pytest.raises(ArgumentError, match=rf'^a: must be bfloat16.*"reference".*; got {name}'):
                call()


A, B = torch.ones(8, 16, dtype=BF16), torch.ones(24, 16, dtype=BF16)


@KERNELS
@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("out: must have stride 1", lambda: gemm(A, B, out=torch.empty(24, 8).T)),
        ("out: must have stride 1", lambda: gemm(A, B, out=torch.empty(8, 48)[:, ::2])),
        ("out: must not overlap a", lambda: gemm(A, A, out=A[:, :8])),
        ("tile: must be None or one of", lambda: gemm(A, B, tile=(128, 160))),
        ("num_sms: must be an integer", lambda: wgrad(A, A, num_sms=-1)),
    ],
)
def test_bad_arguments(message, call, target):
    with deepseek_ops.backend(target), pytest.raises(ArgumentError, match=f"^{message}"):
        call()
