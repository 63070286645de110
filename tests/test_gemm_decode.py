"""FP8 products with few rows: accuracy against fp64, the kernel's bits, batch invariance, masks, memory, arguments."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, _registry
from deepseek_ops._emulation import ASYNCHRONY, SCHEDULES
from deepseek_ops._gemm_checks import SPLITS, choose_split_k
from deepseek_ops._registry import OPS
from deepseek_ops.gemm import fp8_gemm, fp8_gemm_decode, fp8_gemm_masked, fp8_gemm_masked_decode

from .quantize_cases import on_reference
from .test_gemm import as_stored, blocks64, framed, i32, meets_criterion, rows64, rows_of, weight_of

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
M = [0, 1, 2, 7, 8, 9, 16, 33, 63, 64]
N = [8, 33, 72, 128, 136, 576]
K = [16, 128, 144, 512, 1536]
by_split = pytest.mark.parametrize("split_k", SPLITS)


def specification(backend_name: str) -> str:
    """The backend whose bits `backend_name` must give: kernels have a model of their own."""
    return "reference" if backend_name == "reference" else "modelled"


def same(got: torch.Tensor, want: torch.Tensor, backend_name: str) -> bool:
    """Bit for bit in kernels; the reference accumulates exactly and is as near as test_gemm.py asks of small K."""
    if backend_name == "reference" and got.numel() > 0:
        wide = want.double()
        rms = wide[wide != 0].square().mean().sqrt().nan_to_num().item()
        return torch.allclose(got.double(), wide, rtol=0 if got.dtype == FP32 else 2**-7, atol=5e-3 * rms)
    return torch.equal(got, want)


def rows_from(a: torch.Tensor, scale_a: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows with their scales, in tensors of their own."""
    part = a[rows]
    scale = torch.ones(scale_a.shape[0], -(-part.shape[0] // 4) * 4)
    scale[:, : part.shape[0]] = scale_a[:, rows]
    return part.view(torch.uint8).clone().view(E4M3), scale


def batch_of(groups: int, m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    pieces = [rows_of(m, k) for _ in range(groups)]
    return (*(torch.stack(x) for x in zip(*pieces, strict=True)), *weight_of(groups, n, k))


# ---- one product ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "case"),
    [(n, k, i) for i, (n, k) in enumerate(itertools.product(N, K))],
    ids=lambda v: str(v),
)
def test_edges_in_foreign_memory(n, k, case, backend_name):
    """Operands and D inside larger buffers: right values, the specification's bits, nothing around is read or written."""
    for m, split_k in (
        (M[case % 10], SPLITS[case % 4]),
        (M[(case * 3 + 4) % 10], SPLITS[(case + 1 + case // 5) % 4]),
    ):
        torch.manual_seed(case)
        (a, sa), (b, sb) = rows_of(m, k), weight_of(n, k)
        dtype = (BF16, FP32)[case % 2]
        operands = (
            framed(a, 16, -k % 16 + 32, 0x7F),
            framed(sa, 4, 8, float("nan")),
            framed(b, 32, -k % 16 + 16, 0x7F),
            framed(sb, 1, 2, float("nan")),
        )
        out = framed(torch.zeros(m, n, dtype=dtype), (8, 1, 0)[case % 3], (8 - n % 8, 2, 3)[case % 3], 777.0)
        before = [as_stored(x) for x in operands]
        with deepseek_ops.backend(specification(backend_name)):
            wide = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
        result = fp8_gemm_decode(*operands, out=out, split_k=split_k)
        assert result is out and torch.equal(out, wide.to(dtype))
        assert torch.equal(fp8_gemm_decode(a, sa, b, sb, out_dtype=dtype, split_k=split_k), out)
        exact = rows64(a, sa) @ blocks64(b, sb).T
        assert ((wide.double() - exact).abs() <= 2e-3 * k**0.5).all()
        assert all(torch.equal(as_stored(x), y) for x, y in zip(operands, before, strict=True))
        out.fill_(777.0)
        assert (torch.tensor([], dtype=dtype).set_(out.untyped_storage()) == 777.0).all()


@pytest.mark.parametrize("positive", [False, True], ids=["zero_mean", "positive"])
@pytest.mark.parametrize("k", [512, 7168])
@by_split
def test_accuracy_criterion(k, positive, split_k, backend_name):
    torch.manual_seed(k)
    (a, sa), (b, sb) = rows_of(24, k, positive), weight_of(40, k, positive=positive)
    result = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
    assert meets_criterion(result, rows64(a, sa) @ blocks64(b, sb).T, positive)


@pytest.mark.parametrize("split_k", [1, 4])
def test_the_criterion_sees_a_kernel_without_promotion(split_k):
    needs("emulated")
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(24, 7168), weight_of(128, 7168)
    exact = rows64(a, sa) @ blocks64(b, sb).T
    with (
        deepseek_ops.backend("emulated"),
        deepseek_ops.emulation(drop=("promotion", "", 7)),
    ):  # only one of all
        assert not meets_criterion(
            fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k), exact, False
        )


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (7, 0, 16), (7, 8, 0), (0, 0, 0)])
@by_split
def test_empty_products(m, n, k, split_k, backend_name):
    (a, sa), (b, sb) = rows_of(m, k), weight_of(n, k)
    for dtype in (BF16, FP32):
        got = fp8_gemm_decode(a, sa, b, sb, out_dtype=dtype, split_k=split_k)
        assert torch.equal(got, torch.zeros(m, n, dtype=dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 136, 1536), (33, 72, 144), (64, 264, 528)])
def test_one_range_is_fp8_gemm(m, n, k, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(m, k), weight_of(n, k)
    for dtype in (BF16, FP32):
        want = fp8_gemm(a, sa, b, sb, out_dtype=dtype, accumulation="hopper")
        assert same(fp8_gemm_decode(a, sa, b, sb, out_dtype=dtype, split_k=1), want, backend_name)


@pytest.mark.parametrize(("slices", "k"), [(1, 16), (3, 300), (12, 1500)])
@by_split
def test_ranges_are_summed_in_ascending_order(slices, k, split_k, backend_name):
    """The stated rule from its words: every range on its own by fp8_gemm, then fp32 additions."""
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(9, k), weight_of(136, k)
    total = None
    for r in range(split_k):
        first, past = r * slices // split_k, (r + 1) * slices // split_k
        columns = slice(first * 128, min(past * 128, k))
        part = on_reference(fp8_gemm)(
            a[:, columns], sa[first:past], b[:, columns], sb[:, first:past], out_dtype=FP32, accumulation="hopper"
        )  # fmt: skip
        total = part if total is None else total + part
    assert same(fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k), total, backend_name)


@pytest.mark.parametrize("split_k", [None, 1, 8])
def test_a_row_is_the_same_in_any_batch(split_k, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(64, 1100), weight_of(200, 1100)
    whole = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
    for first, past in ((0, 1), (7, 8), (63, 64), (5, 13), (20, 36), (31, 64)):
        rows = slice(first, past)
        part = fp8_gemm_decode(*rows_from(a, sa, rows), b, sb, out_dtype=FP32, split_k=split_k)
        assert same(part, whole[rows], backend_name)


@by_split
def test_knobs_change_no_bit(split_k, backend_name):
    """More tiles than clusters, so that a cluster takes several; weights on their way early."""
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(17, 784), weight_of(400, 784)
    want = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
    for num_sms, prefetch, dtype in ((1, True, FP32), (8, False, FP32), (16, True, BF16), (1000, True, FP32)):
        knobs = {"num_sms": num_sms, "prefetch_weights": prefetch}
        got = fp8_gemm_decode(a, sa, b, sb, out_dtype=dtype, split_k=split_k, **knobs)
        assert torch.equal(got, want.to(dtype))


@by_split
def test_twenty_runs_of_any_schedule_give_the_same_bits(split_k, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(13, 784), weight_of(136, 784)
    want = fp8_gemm_decode(a, sa, b, sb, split_k=split_k)
    for seed in range(20):
        with deepseek_ops.emulation(
            seed=seed, schedule=SCHEDULES[seed % 4], asynchrony=ASYNCHRONY[seed % 3], sm_count=1 + seed % 9
        ):
            assert torch.equal(fp8_gemm_decode(a, sa, b, sb, split_k=split_k), want)


@by_split
def test_nan_and_infinity_stay_where_they_belong(split_k, backend_name):
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(12, 300), weight_of(140, 300)
    clean = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
    a.view(torch.uint8)[5, 290] = 0x7F  # e4m3 NaN
    b.view(torch.uint8)[130, 7] = 0x7F
    sa[1, 9] = torch.inf
    result = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
    assert result[5].isnan().all() and result[:, 130].isnan().all() and not result[9].isfinite().any()
    rows = [row for row in range(12) if row not in (5, 9)]
    columns = [column for column in range(140) if column != 130]
    assert same(result[rows][:, columns], clean[rows][:, columns], backend_name)


def test_scales_of_a_short_row_block_and_a_short_last_tile(backend_name):
    """Values that differ by block: a scale taken from the wrong row, block or slice is far off. 35 slices: more than a warp."""
    slices, rows = 35, 19
    a, b = torch.ones(rows, slices * 128 - 112).to(E4M3), torch.ones(272, slices * 128 - 112).to(E4M3)
    sa = (torch.arange(slices)[:, None] * 100.0 + torch.arange(20)[None, :] + 1).contiguous()
    sa[:, rows:] = float("nan")  # padding is never read
    sb = torch.tensor([1.0, 7.0, 50.0])[:, None] * (1 + torch.arange(slices) % 5)
    lengths = torch.full((slices,), 128.0)
    lengths[-1] = 16
    want = torch.einsum("sm,ns,s->mn", sa[:, :rows], sb, lengths).repeat_interleave(128, 1)[:, :272]
    for split_k in SPLITS:
        got = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=split_k)
        assert torch.allclose(got, want, rtol=2e-3)


def test_the_split_is_chosen_from_the_shape_of_the_weight():
    """Pinned: a change of the rule changes bits of every model that decodes with it."""
    shapes = {
        (2112, 7168): 4, (576, 7168): 8, (1536, 7168): 8, (24576, 1536): 1, (32768, 512): 1, (7168, 16384): 2,
        (36864, 7168): 1, (7168, 18432): 2, (4096, 7168): 4, (7168, 2048): 2, (129280, 7168): 1,
        (128, 128): 1, (128, 1024): 2, (128, 1023): 2, (128, 896): 1, (128, 4096): 8, (0, 0): 1,
    }  # fmt: skip
    assert {shape: choose_split_k(*shape) for shape in shapes} == shapes
    torch.manual_seed(0)
    (a, sa), (b, sb) = rows_of(3, 4096), weight_of(8, 4096)
    with deepseek_ops.backend("modelled"):
        chosen = fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32)
        assert torch.equal(chosen, fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=8))
        assert not torch.equal(chosen, fp8_gemm_decode(a, sa, b, sb, out_dtype=FP32, split_k=1))


# ---- batches -------------------------------------------------------------------------------------------------------

COUNTS = {
    "all_empty": ([0, 0, 0], 7),
    "one_hot": ([0, 9, 0, 0], 9),
    "first_empty": ([0, 3, 64], 64),
    "last_empty": ([33, 2, 0], 40),
    "one_row_each": ([1, 1, 1, 1, 1], 8),
    "full": ([16, 16], 16),
    "single": ([1], 1),
}


@pytest.mark.parametrize(("counts", "room"), COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("n", "k"), [(136, 272), (33, 100)])
def test_masked_rows(counts, room, n, k, backend_name):
    torch.manual_seed(0)
    a, sa, b, sb = batch_of(len(counts), room, n, k)
    valid = torch.arange(room)[None, :] < torch.tensor(counts)[:, None]
    a.view(torch.uint8)[~valid] = 0x7F  # the content of padding never matters
    want = on_reference(fp8_gemm_masked)(a, sa, b, sb, i32(counts), out_dtype=FP32, accumulation="hopper")
    for dtype, num_sms in ((FP32, 0), (BF16, 1)):
        got = fp8_gemm_masked_decode(a, sa, b, sb, i32(counts), out_dtype=dtype, num_sms=num_sms)
        assert same(got, want.to(dtype), backend_name) and (got[~valid] == 0).all()
        out = torch.full((len(counts), room, n), 777.0, dtype=dtype)
        assert fp8_gemm_masked_decode(a, sa, b, sb, i32(counts), out=out, num_sms=num_sms) is out
        assert (out[~valid] == 777.0).all() and same(out[valid], want[valid].to(dtype), backend_name)
    exact = rows64(a, sa) @ blocks64(b, sb).mT
    assert (want[valid].double() - exact[valid]).abs().le(5e-3 * k**0.5).all()


def test_masked_batch_in_foreign_memory(backend_name):
    """Strides between matrices and rows, odd columns: the gaps in D keep their canaries, those of operands are never read."""
    torch.manual_seed(0)
    counts, room, n, k = [3, 0, 7], 7, 131, 144
    a, sa, b, sb = batch_of(3, room, n, k)
    want = on_reference(fp8_gemm_masked)(a, sa, b, sb, i32(counts), out_dtype=FP32, accumulation="hopper")

    def apart(x, fill):
        codes = x.view(torch.uint8) if x.dtype == E4M3 else x
        around = torch.full(
            (x.shape[0], x.shape[1] + 3, -(-x.shape[2] // 16) * 16 + 16), fill, dtype=codes.dtype
        )
        around[:, 1:-2, : x.shape[2]] = codes
        return around[:, 1:-2, : x.shape[2]].view(x.dtype)

    frame = torch.full((3, room + 4, n + 6), 777.0)
    out = frame[:, 2:-2, 3:-3]
    operands = apart(a, 0x7F), apart(sa, float("nan")), apart(b, 0x7F), apart(sb, float("nan"))
    fp8_gemm_masked_decode(*operands, i32(counts), out=out)
    for g, count in enumerate(counts):
        assert same(out[g, :count], want[g, :count], backend_name)
        out[g, :count] = 777.0
    assert (frame == 777.0).all()


@pytest.mark.parametrize("groups", [257, 512])
def test_many_groups_of_which_few_have_rows(groups, backend_name):
    torch.manual_seed(0)
    a, sa = rows_of(8, 128)
    b, sb = weight_of(3, 8, 128)
    busy = {0: 1, 15: 8, 16: 3, 255: 2, groups - 1: 5}
    counts = [busy.get(g, 0) for g in range(groups)]
    # One matrix of operands for all groups (stride 0), three kinds of weights in turn.
    kinds = torch.arange(groups) % 3
    batch = (
        a.view(torch.uint8).expand(groups, -1, -1).view(E4M3),
        sa.expand(groups, -1, -1),
        b.view(torch.uint8)[kinds].view(E4M3),
        sb[kinds],
    )
    out = torch.full((groups, 8, 8), 777.0)
    fp8_gemm_masked_decode(*batch, i32(counts), out=out)
    want = [fp8_gemm_decode(a, sa, b[g], sb[g], out_dtype=FP32) for g in range(3)]
    for g, count in enumerate(counts):
        assert same(out[g, :count], want[g % 3][:count], backend_name) and (out[g, count:] == 777.0).all()


def test_groups_without_rows_cost_nothing():
    """No multiplication, no load: the work is that of the one group with rows."""
    needs("emulated")
    a, sa, b, sb = batch_of(8, 4, 136, 256)
    work = []
    for counts in ([0, 4, 0, 0, 0, 0, 0, 0], [0] * 8):
        out = torch.zeros(8, 4, 136)
        with deepseek_ops.backend("emulated"):
            fp8_gemm_masked_decode(a, sa, b, sb, i32(counts), out=out)
            work.append(deepseek_ops.last_statistics())
    assert work[0].wgmma == 2 * 2 * 2 * 4 * 128  # tiles, slices of K, math groups, steps, threads
    assert work[0].async_operations > 0
    assert work[1].wgmma == 0 and work[1].async_operations == 0


def test_nonsense_in_the_mask_stays_within_the_tensors():
    """Only kernels: the device cannot raise, so a count is clamped."""
    a, sa, b, sb = batch_of(4, 5, 40, 144)
    want = on_reference(fp8_gemm_masked)(
        a, sa, b, sb, i32([0, 5, 5, 2]), out_dtype=FP32, accumulation="hopper"
    )
    for name in ("emulated", "checked"):
        needs(name)
        with deepseek_ops.backend(name):
            nonsense = i32([-7, 2**31 - 1, 6, 2])
            got = fp8_gemm_masked_decode(a, sa, b, sb, nonsense, out_dtype=FP32)
            frame = torch.full((4, 70, 44), 777.0)
            fp8_gemm_masked_decode(a, sa, b, sb, nonsense, out=frame[:, :5, :40])
        assert torch.equal(got, want)
        for g, count in enumerate([0, 5, 5, 2]):
            assert torch.equal(frame[g, :count, :40], want[g, :count])
            frame[g, :count, :40] = 777.0
        assert (frame == 777.0).all()


def test_offsets_beyond_32_bits():
    """Matrices more than 2^31 elements apart, in memory that is reserved and mostly never touched."""
    needs("emulated")
    apart = 2**31 + 64
    try:
        room_b, room_d = (
            torch.empty(apart + 8 * 128, dtype=torch.uint8),
            torch.empty(apart + 4 * 8, dtype=BF16),
        )
    except RuntimeError as error:
        pytest.skip(f"no address space for 6 GiB: {error}")
    a, sa, b, sb = batch_of(2, 4, 8, 128)
    far = room_b.as_strided((2, 8, 128), (apart, 128, 1))
    far.copy_(b.view(torch.uint8))
    out = room_d.as_strided((2, 4, 8), (apart, 8, 1))
    with deepseek_ops.backend("emulated"):
        fp8_gemm_masked_decode(a, sa, far.view(E4M3), sb, i32([4, 3]), out=out)
    want = on_reference(fp8_gemm_masked)(a, sa, b, sb, i32([4, 3]), accumulation="hopper")
    assert torch.equal(out[0], want[0]) and torch.equal(out[1, :3], want[1, :3])


# ---- arguments -----------------------------------------------------------------------------------------------------


def needs(name: str) -> None:
    reason = _registry.absent_reason(name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")


def valid(name: str) -> dict:
    torch.manual_seed(0)
    if name == "fp8_gemm_decode":
        (a, sa), (b, sb) = rows_of(6, 256), weight_of(8, 256)
        return {"a": a, "scale_a": sa, "b": b, "scale_b": sb}
    a, sa, b, sb = batch_of(2, 6, 8, 256)
    return {"a": a, "scale_a": sa, "b": b, "scale_b": sb, "masked_m": i32([0, 6])}


def call(name: str, **changes):
    return globals()[name](**{**valid(name), **changes})


def refused(message: str):
    return pytest.raises(ArgumentError, match="^" + re.escape(message))


BOTH = ["fp8_gemm_decode", "fp8_gemm_masked_decode"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "fp8_gemm_decode",
            {"a": torch.zeros(65, 256).to(E4M3)},
            "a: must have at most 64 rows (fp8_gemm takes any number); got 65",
        ),
        (
            "fp8_gemm_masked_decode",
            {"a": torch.zeros(2, 65, 256).to(E4M3)},
            "a: must have at most 64 rows (fp8_gemm_masked takes any number); got 65",
        ),
        (
            "fp8_gemm_masked_decode",
            {"a": torch.zeros(513, 1, 256).to(E4M3)},
            "a: must have at most 512 matrices; got 513",
        ),
        ("fp8_gemm_decode", {"split_k": 3}, "split_k: must be None, 1, 2, 4 or 8; got 3"),
        ("fp8_gemm_decode", {"split_k": 16}, "split_k: must be None, 1, 2, 4 or 8; got 16"),
        ("fp8_gemm_decode", {"split_k": True}, "split_k: must be None, 1, 2, 4 or 8; got True"),
        ("fp8_gemm_decode", {"split_k": "2"}, "split_k: must be None, 1, 2, 4 or 8; got '2'"),
        (
            "fp8_gemm_decode",
            {"b": torch.zeros(8, 128).to(E4M3)},
            "b: dimension 1 must be 256 as a has columns",
        ),
        (
            "fp8_gemm_masked_decode",
            {"b": torch.zeros(3, 8, 256).to(E4M3)},
            "b: dimension 0 must be 2 as a has",
        ),
        ("fp8_gemm_masked_decode", {"masked_m": i32([1])}, "masked_m: must have shape [2]; got shape (1,)"),
        ("fp8_gemm_masked_decode", {"masked_m": torch.zeros(2)}, "masked_m: must be int32; got float32"),
    ],
    ids=lambda x: x if isinstance(x, str) and ":" not in x else "",
)
def test_errors(name, changes, message, backend_name):
    with refused(message):
        call(name, **changes)


@pytest.mark.parametrize("name", BOTH)
def test_errors_of_both(name, backend_name):
    shape = call(name).shape
    for changes, message in (
        ({"a": valid(name)["a"].to(BF16)}, "a: must be float8_e4m3fn; got bfloat16"),
        ({"b": None}, "b: must be a torch.Tensor; got NoneType"),
        ({"scale_a": torch.ones(3, 5)}, "scale_a: must have shape "),
        ({"scale_b": torch.ones(3, 5)}, "scale_b: must have shape "),
        ({"num_sms": -1}, "num_sms: must be an integer in 0..2^31-1 (0: all); got -1"),
        (
            {"out_dtype": torch.float16},
            "out_dtype: must be one of torch.bfloat16, torch.float32; got torch.float16",
        ),
        ({"out": torch.zeros(shape).double()}, "out: must be bfloat16 or float32; got float64"),
        ({"out": torch.zeros(3)}, "out: must have shape "),
        ({"out": torch.zeros(shape), "out_dtype": BF16}, "out_dtype: must be None or out's torch.float32"),
    ):
        with refused(message):
            call(name, **changes)


@pytest.mark.parametrize("backend", ["emulated", "checked"])
def test_errors_of_kernels_alone(backend):
    needs(backend)
    arguments, out = valid("fp8_gemm_decode"), torch.full((6, 16), 777.0)
    with deepseek_ops.backend(backend):
        with refused("a: must have stride 1 along dimension 1"):
            call("fp8_gemm_decode", a=arguments["a"].view(torch.uint8).T.contiguous().T.view(E4M3))
        with refused("out: must have stride 1 along dimension 1"):
            call("fp8_gemm_decode", out=out[:, ::2])
        with refused("b: must start at a multiple of 16 bytes"):
            call("fp8_gemm_decode", b=torch.zeros(8, 272, dtype=torch.uint8)[:, 8:264].view(E4M3))
        with refused("out: must not overlap"):
            shared = torch.zeros(8, 256, dtype=torch.uint8)
            call(
                "fp8_gemm_decode", b=shared.view(E4M3), out=shared.view(-1)[: 6 * 8 * 2].view(BF16).view(6, 8)
            )
        raw, positional = OPS["fp8_gemm_decode"].raw, tuple(arguments.values())
        with refused("split_k: must be 1, 2, 4 or 8; got 16"):
            raw(*positional, FP32, 16)
        with refused("num_sms: must be in 0..2^31-1; got -1"):
            raw(*positional, FP32, 1, -1)
        with refused(
            "a: must have at most 64 rows, all of which one tile multiplies with the weights; got 65"
        ):
            (a, sa), (b, sb) = rows_of(65, 256), weight_of(8, 256)
            raw(a, sa, b, sb, FP32, 1)
        with refused("a: must have at most 512 matrices; got 513"):
            a, sa = torch.zeros(513, 1, 16).to(E4M3), torch.ones(513, 1, 4)
            b, sb, masked_m = torch.zeros(513, 8, 16).to(E4M3), torch.ones(513, 1, 1), i32([0] * 513)
            OPS["fp8_gemm_masked_decode"].raw(a, sa, b, sb, masked_m, FP32)
    assert (out == 777.0).all()


@pytest.mark.parametrize("name", BOTH)
def test_opcheck_and_operands_are_not_written(name, backend_name):
    arguments = list(valid(name).values())
    rest = (2, 0, True) if name == "fp8_gemm_decode" else (0,)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(OPS[name].raw, (*arguments, FP32, *rest), test_utils=tests)
    out = torch.zeros(call(name).shape)
    torch.library.opcheck(OPS[name + "_"].raw, (*arguments, out, *rest), test_utils=tests)
    for given, before in zip(arguments, valid(name).values(), strict=True):
        assert torch.equal(given.view(torch.uint8), before.view(torch.uint8))


def test_compile_whole():
    arguments = valid("fp8_gemm_decode")

    def step(sink):
        return fp8_gemm_decode(**arguments, split_k=2), fp8_gemm_decode(**arguments, out=sink)

    sinks = torch.zeros(6, 8), torch.zeros(6, 8)
    eager = step(sinks[0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(sinks[1])
    for x, y in zip(eager, compiled, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("room", "tile", "kernel"), [(64, None, "decode"), (65, None, "gemm"), (64, (64, 128), "gemm")]
)
def test_masked_products_with_little_room_take_the_kernel_of_decoding(room, tile, kernel):
    reason = _registry.absent_reason("emulated")
    if reason:
        pytest.skip(f"backend emulated: {reason}")
    a, scale_a, b, scale_b = batch_of(2, room, 136, 272)
    masked_m = i32([room, 3])
    with deepseek_ops.backend("modelled"):
        want = fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out_dtype=FP32)
    with deepseek_ops.backend("emulated"):
        got = fp8_gemm_masked(a, scale_a, b, scale_b, masked_m, out_dtype=FP32, tile=tile)
    assert torch.equal(got, want)
    files = {site.site.split(":")[0] for site in deepseek_ops.drop_sites()}
    assert any(file.startswith(f"fp8_{kernel}") for file in files)
    assert not any(file.startswith("fp8_gemm" if kernel == "decode" else "fp8_decode") for file in files)
