"""The GEMM family as ops: every argument error, schemas and fakes (opcheck), and torch.compile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, _registry
from deepseek_ops import gemm as family
from deepseek_ops import quantize as quant
from deepseek_ops._gemm_checks import FP8_GEMM_TILES, FP8_WGRAD_TILES
from deepseek_ops._registry import OPS

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
FP8 = ["fp8_gemm", "fp8_gemm_grouped", "fp8_gemm_masked", "fp8_wgrad", "fp8_wgrad_grouped"]
WIDE = ["gemm", "gemm_grouped", "gemm_masked", "wgrad", "wgrad_grouped"]
LEGAL = ", ".join(map(str, FP8_GEMM_TILES))
ACCUMULATING = ["fp8_gemm", "fp8_wgrad", "fp8_wgrad_grouped", "gemm", "wgrad", "wgrad_grouped"]


def i32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def valid(name: str) -> dict:
    """Arguments of a valid call."""
    torch.manual_seed(0)
    a, b, c = torch.randn(6, 256), torch.randn(2, 8, 256), torch.randn(8, 256)
    if not name.startswith("fp8_"):
        a, b, c = a.to(BF16), b.to(BF16), c.to(BF16)
        return {
            "gemm": {"a": a, "b": b[0]},
            "gemm_grouped": {"a": a, "b": b, "offsets": i32([0, 2, 6])},
            "gemm_masked": {"a": torch.stack([a, a]), "b": b, "masked_m": i32([0, 6])},
            "wgrad": {"a": a.T, "b": c.T},
            "wgrad_grouped": {"a": a.T, "b": c.T, "offsets": i32([0, 100, 256])},
        }[name]
    (a, sa), (b, sb), (c, sc) = quant.quantize_1x128(a), quant.quantize_128x128(b), quant.quantize_1x128(c)
    left = {"a": a, "scale_a": sa}
    transposed = {"a_t": a, "scale_a": sa, "b_t": c, "scale_b": sc}
    batch = {"a": torch.stack([a, a]), "scale_a": torch.stack([sa, sa])}
    return {
        "fp8_gemm": {**left, "b": b[0], "scale_b": sb[0]},
        "fp8_gemm_grouped": {**left, "b": b, "scale_b": sb, "offsets": i32([0, 2, 6])},
        "fp8_gemm_masked": {**batch, "b": b, "scale_b": sb, "masked_m": i32([0, 6])},
        "fp8_wgrad": transposed,
        "fp8_wgrad_grouped": {**transposed, "offsets": i32([0, 128, 256])},
    }[name]


def call(name: str, **changes):
    return getattr(family, name)(**{**valid(name), **changes})


def refused(message: str):
    """Expect an ArgumentError that begins like this."""
    return pytest.raises(ArgumentError, match="^" + re.escape(message))


@pytest.mark.parametrize("name", FP8 + WIDE)
def test_errors_of_outputs(name):
    shape = call(name).shape
    with refused("out_dtype: must be one of torch.bfloat16, torch.float32; got torch.float16"):
        call(name, out_dtype=torch.float16)
    with refused("out: must be bfloat16 or float32; got float64"):
        call(name, out=torch.empty(shape, dtype=torch.float64))
    with refused(f"out: must have shape {list(shape)}; got shape {(*shape[:-1], 3)}"):
        call(name, out=torch.empty(*shape[:-1], 3))
    with refused("out: must be on cpu; got meta"):
        call(name, out=torch.empty(shape, device="meta"))
    with refused("out: must be a torch.Tensor; got str"):
        call(name, out="here")
    with refused("out_dtype: must be None or out's torch.float32; got torch.bfloat16"):
        call(name, out=torch.empty(shape), out_dtype=BF16)


@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulate_needs_out(name):
    with refused("accumulate: needs out to add to; got out=None"):
        call(name, accumulate=True)


@pytest.mark.parametrize("name", FP8)
def test_errors_of_fp8_operands(name):
    left, right = ("a_t", "b_t") if "wgrad" in name else ("a", "b")
    arguments = valid(name)
    for argument, dtype in ((left, E4M3), (right, E4M3), ("scale_a", FP32), ("scale_b", FP32)):
        name_of_dtype = str(dtype).removeprefix("torch.")
        with refused(f"{argument}: must be {name_of_dtype}; got bfloat16"):
            call(name, **{argument: arguments[argument].to(BF16)})
        with refused(f"{argument}: must be a torch.Tensor; got NoneType"):
            call(name, **{argument: None})
        if argument != left:
            with refused(f"{argument}: must be on cpu; got meta"):
                call(name, **{argument: arguments[argument].to("meta")})
    for argument in ("scale_a", "scale_b"):
        right_shape = list(arguments[argument].shape)
        with refused(f"{argument}: must have shape {right_shape}; got shape (3, 5)"):
            call(name, **{argument: torch.ones(3, 5)})
    shorter = arguments[right][..., :128]
    dim = shorter.ndim - 1
    with pytest.raises(ArgumentError, match=f"^{right}: dimension {dim} must be 256 as {left} has "):
        call(name, **{right: shorter})
    with refused(f"{left}: must have {arguments[left].ndim} dimension(s); got shape (256,)"):
        call(name, **{left: torch.zeros(256).to(E4M3)})
    with refused("accumulation: must be one of 'exact', 'hopper', 'hopper_unpromoted'; got 'fast'"):
        call(name, accumulation="fast")


@pytest.mark.parametrize("name", WIDE)
def test_errors_of_wide_operands(name):
    arguments = valid(name)
    with refused("a: must be bfloat16 or float32 or float64; got float16"):
        call(name, a=arguments["a"].half())
    with refused("b: must be bfloat16; got float32"):
        call(name, b=arguments["b"].float())
    with refused("a: must be a torch.Tensor; got NoneType"):
        call(name, a=None)
    with refused("b: must be on cpu; got meta"):
        call(name, b=arguments["b"].to("meta"))
    with pytest.raises(ArgumentError, match=r"^b: dimension \d must be \d+ as a has (columns|tokens)"):
        call(name, b=arguments["b"][..., :128] if "wgrad" not in name else arguments["b"][:128])
    with refused("out_dtype: must be one of torch.float64; got torch.float32"):
        call(name, a=arguments["a"].double(), b=arguments["b"].double(), out_dtype=FP32)
    out = torch.empty(call(name).shape)
    for argument in ("a", "b"):
        with refused("out: must be None while gradients of a or b are recorded"):
            call(name, **{argument: arguments[argument].clone().requires_grad_()}, out=out)
        with torch.no_grad():
            call(name, **{argument: arguments[argument].clone().requires_grad_()}, out=out)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemm_grouped", {"offsets": torch.zeros(3, dtype=torch.int64)}, "offsets: must be int32; got int64"),
        ("gemm_grouped", {"offsets": i32([0, 6])}, "offsets: must have shape [3]; got shape (2,)"),
        ("gemm_grouped", {"offsets": i32([0, 5, 3])}, "offsets: must ascend within 0..6; got [0, 5, 3]"),
        ("gemm_grouped", {"offsets": i32([0, 5, 7])}, "offsets: must ascend within 0..6; got [0, 5, 7]"),
        ("gemm_grouped", {"offsets": i32([-1, 5, 6])}, "offsets: must ascend within 0..6; got [-1, 5, 6]"),
        ("wgrad_grouped", {"offsets": i32([0, 257])}, "offsets: must ascend within 0..256; got [0, 257]"),
        ("wgrad_grouped", {"offsets": i32([])}, "offsets: must hold at least one entry (G + 1); got (0,)"),
        ("wgrad_grouped", {"offsets": i32([[0]])}, "offsets: must have shape [*]; got shape (1, 1)"),
        ("wgrad_grouped", {"offsets": i32([0]).to("meta")}, "offsets: must be on cpu; got meta"),
        ("gemm_masked", {"masked_m": i32([1, 2, 3])}, "masked_m: must have shape [2]; got shape (3,)"),
        ("gemm_masked", {"masked_m": torch.zeros(2)}, "masked_m: must be int32; got float32"),
    ],
)
def test_errors_of_groups(name, changes, message):
    for prefix in ("", "fp8_"):
        with refused(message):
            call(prefix + name, **changes)


def test_more_errors_of_groups():
    with refused("offsets: must be multiples of 128; got [0, 100, 256]"):
        call("fp8_wgrad_grouped", offsets=i32([0, 100, 256]))
    with refused("b: dimension 0 must be 2 as a has matrices; got (3, 8, 256)"):
        call("fp8_gemm_masked", b=torch.zeros(3, 8, 256).to(E4M3))
    with refused("b: dimension 0 must be 2 as a has matrices; got (3, 8, 256)"):
        call("gemm_masked", b=torch.zeros(3, 8, 256, dtype=BF16))


@pytest.mark.parametrize("name", ["fp8_gemm_grouped", "fp8_wgrad_grouped", "gemm_grouped", "wgrad_grouped"])
def test_a_refused_call_writes_nothing(name):
    out = torch.full(call(name).shape, 777.0)
    with pytest.raises(ArgumentError):
        call(name, out=out, offsets=i32([0, 128, 1024]))
    assert (out == 777.0).all()


@pytest.mark.parametrize("name", FP8 + WIDE)
def test_opcheck(name):
    arguments = list(valid(name).values())
    last = ("hopper",) if name.startswith("fp8_") else ()
    accumulate = (True,) if name in ACCUMULATING else ()
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not last:  # opcheck's own comparison of inputs before and after does not exist for fp8
        tests.append("test_schema")
    torch.library.opcheck(OPS[name].raw, (*arguments, FP32, *last), test_utils=tests)
    out = torch.zeros(call(name).shape)
    torch.library.opcheck(OPS[name + "_"].raw, (*arguments, out, *accumulate, *last), test_utils=tests)


@pytest.mark.parametrize("name", FP8)
def test_fp8_operands_are_not_written(name):
    arguments = valid(name)
    for accumulation in ("exact", "hopper", "hopper_unpromoted"):
        call(name, **arguments, accumulation=accumulation)
    for key, before in valid(name).items():
        assert torch.equal(arguments[key].view(torch.uint8), before.view(torch.uint8))


# These have kernels: the same bodies on every backend.
@pytest.mark.parametrize(
    "body",
    [test_errors_of_outputs, test_accumulate_needs_out, test_errors_of_fp8_operands, test_opcheck],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
@pytest.mark.parametrize("name", ["fp8_gemm", "fp8_wgrad", "fp8_wgrad_grouped"])
def test_fp8_kernels_on_every_backend(body, name, backend_name):
    body(name)


@pytest.mark.parametrize("name", ["fp8_wgrad", "fp8_wgrad_grouped"])
def test_fp8_wgrad_does_not_write_its_operands(name, backend_name):
    arguments = valid(name)
    for accumulation in ("exact", "hopper"):
        call(name, **arguments, accumulation=accumulation)
    for key, before in valid(name).items():
        assert torch.equal(arguments[key].view(torch.uint8), before.view(torch.uint8))


def test_fp8_gemm_does_not_write_its_operands(backend_name):
    arguments = valid("fp8_gemm")
    for accumulation in ("exact", "hopper"):
        call("fp8_gemm", **arguments, accumulation=accumulation)
    for key, before in valid("fp8_gemm").items():
        assert torch.equal(arguments[key].view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_sms": -1}, "num_sms: must be an integer in 0..2^31-1 (0: all); got -1"),
        ({"num_sms": 2**31}, "num_sms: must be an integer in 0..2^31-1 (0: all); got 2147483648"),
        ({"num_sms": 2.0}, "num_sms: must be an integer in 0..2^31-1 (0: all); got 2.0"),
        ({"num_sms": True}, "num_sms: must be an integer in 0..2^31-1 (0: all); got True"),
        ({"tile": (128, 64)}, f"tile: must be None or one of {LEGAL}; got (128, 64)"),
        ({"tile": (0, 0)}, f"tile: must be None or one of {LEGAL}; got (0, 0)"),
        ({"tile": 128}, f"tile: must be None or one of {LEGAL}; got 128"),
        ({"tile": [128, 128]}, f"tile: must be None or one of {LEGAL}; got [128, 128]"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_errors_of_knobs(knobs, message, backend_name):
    for out in (None, torch.full((6, 8), 777.0)):
        with refused(message):
            call("fp8_gemm", **knobs, out=out)
        assert out is None or (out == 777.0).all()


@pytest.mark.parametrize("name", ["fp8_wgrad", "fp8_wgrad_grouped"])
def test_errors_of_knobs_of_wgrad(name, backend_name):
    legal = ", ".join(map(str, FP8_WGRAD_TILES))
    for knobs, message in (
        ({"num_sms": -1}, "num_sms: must be an integer in 0..2^31-1 (0: all); got -1"),
        ({"tile": (256, 128)}, f"tile: must be None or one of {legal}; got (256, 128)"),
        ({"tile": 128}, f"tile: must be None or one of {legal}; got 128"),
    ):
        out = torch.full(call(name).shape, 777.0)
        with refused(message):
            call(name, **knobs, out=out)
        assert (out == 777.0).all()


@pytest.mark.parametrize(
    ("file", "table", "tiles"),
    [
        ("fp8_gemm.h", "kFp8GemmTiles", FP8_GEMM_TILES),
        ("fp8_wgrad.h", "kFp8WgradTiles", FP8_WGRAD_TILES),
    ],
)
def test_legal_tiles_are_those_of_the_kernels(file, table, tiles):
    header = (Path(__file__).parents[1] / "csrc" / "gemm" / file).read_text()
    listed = header.split(f"{table}[] = {{", 1)[1].split(";", 1)[0]
    pairs = re.findall(r"\{(\d+), (\d+)\}", listed)
    assert tuple((int(rows), int(columns)) for rows, columns in pairs) == tiles


@pytest.mark.parametrize("name", ["emulated", "checked"])
@pytest.mark.parametrize("op", ["fp8_wgrad", "fp8_wgrad_grouped"])
def test_errors_of_wgrad_kernels_alone(op, name):
    reason = _registry.absent_reason(name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    arguments, shape = valid(op), call(op).shape
    out = torch.full((*shape[:-1], 16), 777.0)
    with deepseek_ops.backend(name):
        with refused("accumulation: must be exact or hopper, which kernels compute"):
            call(op, accumulation="hopper_unpromoted")
        with refused("a_t: must have stride 1 along dimension 1"):
            call(op, a_t=arguments["a_t"].view(torch.uint8).T.contiguous().T.view(E4M3))
        with refused(f"out: must have stride 1 along dimension {len(shape) - 1}"):
            call(op, out=out[..., ::2])
        shifted = torch.zeros(8, 272, dtype=torch.uint8)[:, 8:264].view(E4M3)
        with refused("b: must start at a multiple of 16 bytes"):
            call(op, b_t=shifted)
        with refused("scale_b: must start at a multiple of 16 bytes"):
            call(op, scale_b=torch.ones(2, 12)[:, 1:9])
        if op == "fp8_wgrad_grouped":
            overlapping = torch.full((1, *shape[1:]), 777.0).expand(2, -1, -1)
            with refused("d_group_stride: must be at least the length of a group; got 0"):
                call(op, out=overlapping)
            with refused("offsets: must be contiguous"):
                call(op, offsets=i32([0, 9, 128, 9, 256])[::2])
        raw, positional = OPS[op].raw, tuple(arguments.values())
        with refused(f"tile: must be one of {', '.join(map(str, FP8_WGRAD_TILES))}; got (128, 0)"):
            raw(*positional, FP32, "hopper", 0, 128, 0)
        with refused("tile_rows: must be in 0..2^31-1; got 1099511627776"):
            raw(*positional, FP32, "hopper", 0, 2**40, 128)
    assert (out == 777.0).all()


@pytest.mark.parametrize("name", ["emulated", "checked"])
def test_errors_of_kernels_alone(name):
    reason = _registry.absent_reason(name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    arguments, out = valid("fp8_gemm"), torch.full((6, 16), 777.0)
    with deepseek_ops.backend(name):
        with refused("accumulation: must be exact or hopper, which kernels compute"):
            call("fp8_gemm", accumulation="hopper_unpromoted")
        with refused("a: must have stride 1 along dimension 1"):
            call("fp8_gemm", a=arguments["a"].view(torch.uint8).T.contiguous().T.view(E4M3))
        with refused("out: must have stride 1 along dimension 1"):
            call("fp8_gemm", out=out[:, ::2])
        with refused("b: must start at a multiple of 16 bytes"):
            call("fp8_gemm", b=torch.zeros(8, 272, dtype=torch.uint8)[:, 8:264].view(E4M3))
        raw, positional = OPS["fp8_gemm"].raw, tuple(arguments.values())
        for knobs, message in (
            ((-1, 0, 0), "num_sms: must be in 0..2^31-1; got -1"),
            ((0, 128, 0), f"tile: must be one of {LEGAL}; got (128, 0)"),
            ((0, 2**40, 128), "tile_rows: must be in 0..2^31-1; got 1099511627776"),
        ):
            with refused(message):
                raw(*positional, FP32, "hopper", *knobs)
    assert (out == 777.0).all()


def test_opcheck_of_the_masked_weight_gradient():
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    torch.library.opcheck(OPS["wgrad_masked"].raw, (a, b, i32([5, 2]), FP32))


def test_compile_whole_with_gradients():
    offsets, masked_m = i32([0, 3, 3, 7]), i32([2, 0, 4])

    def step(x, w, experts, sink):
        y = family.gemm_grouped(family.gemm(x, w), experts, offsets)
        z = family.gemm_masked(y[:6].reshape(3, 2, -1).repeat(1, 2, 1), experts.mT, masked_m)
        family.wgrad_grouped(y.detach(), x.detach(), offsets, out=sink, accumulate=True)
        q, scale = quant.quantize_1x128(y.detach())
        weight, weight_scale = quant.quantize_128x128(w.detach())
        again = family.fp8_gemm(q, scale, weight.view(torch.uint8).mT.contiguous().view(E4M3), weight_scale)
        return z.square().sum() + y.sum(), again

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        x, w, experts = torch.randn(9, 8), torch.randn(12, 8), torch.randn(3, 12, 12)
        leaves = [t.requires_grad_() for t in (x, w, experts)]
        sink = torch.ones(3, 12, 8)
        loss, again = function(*leaves, sink)
        loss.backward()
        results.append([loss.detach(), again, sink, *(t.grad for t in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-4)
