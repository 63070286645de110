"""Kernels on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/claims.py finds its evidence by them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

import deepseek_ops
from bench.proof.benchmarks import CODED, QUANTISERS, same_bits
from bench.proof.claims import MOE_KERNELS
from deepseek_ops import gemm, moe, optimizer, quantize
from deepseek_ops._gemm_checks import FP8_WGRAD_TILES
from deepseek_ops._registry import OPS, absent_reason

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda_backend() -> Iterator[None]:
    reason = absent_reason("cuda")
    if reason:
        pytest.skip(f"backend cuda: {reason}")
    yield


def need_kernel(op: str) -> None:
    """A module that lost a kernel is a failure, not a skip."""
    assert "cuda" in OPS[op].kernels, f"{op} has no cuda kernel"


def special(tokens: int, hidden: int) -> torch.Tensor:
    """bf16 with every kind of tile: zeros, -0, subnormals, Inf, NaN, powers of two, a wide range."""
    generator = torch.Generator().manual_seed(tokens * 131 + hidden)
    x = torch.randn(tokens, hidden, generator=generator)
    x *= torch.exp2(torch.randint(-40, 40, (tokens, 1), generator=generator).float())
    rows = iter(range(0, max(tokens - 8, 0), 3))
    for values in (
        [0.0],
        [-0.0],
        [1e-39],
        [float("inf"), 1.0],
        [float("nan"), -2.0],
        [448.0, -448.0],
        [2.0**-118],
    ):
        row = next(rows, None)
        if row is not None:
            x[row] = torch.tensor(values).repeat(hidden)[:hidden]
    return x.to(torch.bfloat16)


SHAPES = [(1, 128), (7, 72), (128, 128), (129, 7168), (257, 576), (4097, 2048)]


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("kernel", QUANTISERS)
def test_quantiser_bytes(kernel: str, tokens: int, hidden: int, pow2: bool) -> None:
    """Bytes and scales equal the reference's on the CPU."""
    need_kernel(kernel)
    function: Callable = getattr(quantize, kernel)
    x = special(tokens, hidden)
    with deepseek_ops.backend("reference"):
        want = function(x, pow2=pow2)
    with deepseek_ops.backend("cuda"):
        got = function(x.cuda(), pow2=pow2)
    for g, w in zip(got, want, strict=True):
        assert same_bits(g.cpu(), w)


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("kernel", CODED)
def test_coded_bytes(kernel: str, tokens: int, hidden: int) -> None:
    """Ops on codes give the reference's bits; NaN equals NaN."""
    need_kernel(kernel.removesuffix("_row"))
    x = special(tokens, hidden)
    with deepseek_ops.backend("reference"):
        want = CODED[kernel][1](x)()
    with deepseek_ops.backend("cuda"):
        got = CODED[kernel][1](x.cuda())()
    for g, w in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
        g = g.cpu()
        if g.dtype == torch.bfloat16:
            g, w = (torch.where(v.isnan(), torch.nan, v) for v in (g, w))
        assert same_bits(g, w)


def training_state(moments: torch.dtype, grads: torch.dtype) -> list[list[torch.Tensor]]:
    """params, grads, exp_avg, exp_avg_sq, out of 150 tensors, more than a launch holds, one of them large."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(i * 37) % 1000 for i in range(149)] + [3_000_001]
    first = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(3)]
    second = [torch.rand(n, generator=generator) for n in sizes]
    params, gradients, exp_avg = first
    return [
        params,
        [g.to(grads) for g in gradients],
        [m.to(moments) for m in exp_avg],
        [v.to(moments) for v in second],
        [p.bfloat16() for p in params],
    ]


def one_step(state: list[list[torch.Tensor]], **options: object) -> None:
    arguments = {"lr": 1e-3, "step": 3, "first_index": 2**32 - 5000, "seed": 7, **options}
    optimizer.adamw_(*state[:4], out=state[4], **arguments)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_bits(moments: torch.dtype, grads: torch.dtype, stochastic: bool) -> None:
    """Every parameter and moment has the bits of the reference on the CPU."""
    need_kernel("adamw_")
    state = training_state(moments, grads)
    device = [[t.cuda() for t in ts] for ts in state]
    with deepseek_ops.backend("reference"):
        one_step(state, stochastic_rounding=stochastic)
    with deepseek_ops.backend("cuda"):
        one_step(device, stochastic_rounding=stochastic)
    for ours, theirs in zip(device, state, strict=True):
        assert all(same_bits(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_with_copies_bits(moments: torch.dtype, pow2: bool) -> None:
    """FP8 copies of weights, whole and ragged, in a list with other tensors: the bytes of separate passes on the CPU."""
    need_kernel("adamw_quantize_")
    generator = torch.Generator().manual_seed(5)
    shapes = [(512, 768), (7,), (576, 144), (3, 130, 272), (129, 20), (4099,), (1, 1)]
    made = [[torch.rand(shape, generator=generator) - 0.2 for shape in shapes] for _ in range(4)]
    state = [
        *made[:2],
        *([t.abs().to(moments) for t in ts] for ts in made[2:]),
        [p.bfloat16() for p in made[0]],
    ]
    device = [[t.cuda() for t in ts] for ts in state]
    with deepseek_ops.backend("reference"):
        one_step(state, stochastic_rounding=True)
        pairs = [quantize.quantize_128x128(p, pow2=pow2) if p.ndim > 1 else None for p in state[0]]
        want = [pair and (*pair, *quantize.transpose_128x128(*pair)) for pair in pairs]
    copies = [four and tuple(torch.empty_like(t, device="cuda") for t in four) for four in want]
    with deepseek_ops.backend("cuda"):
        one_step(device, stochastic_rounding=True, fp8_out=copies, fp8_pow2=pow2)
    for ours, theirs in zip(device, state, strict=True):
        assert all(same_bits(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(copies, want, strict=True):
        assert all(same_bits(a.cpu(), b) for a, b in zip(ours or (), theirs or (), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clip_bits(dtype: torch.dtype) -> None:
    """Norm and factor, on lists that take several launches; NaN and infinities reach them."""
    need_kernel("clip_grad_norm")
    grads = [g.to(dtype) for g in training_state(torch.float32, torch.float32)[1]]
    for bad in (None, float("nan"), float("inf")):
        if bad is not None:
            grads[149][2_999_999] = bad
        with deepseek_ops.backend("reference"):
            want = optimizer.clip_grad_norm(grads, 1.0)
        with deepseek_ops.backend("cuda"):
            got = optimizer.clip_grad_norm([g.cuda() for g in grads], 1.0)
        assert all(
            torch.equal(a.cpu().nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, want, strict=True)
        )


def test_adamw_graph() -> None:
    """Clip and step in one graph: a bad gradient skips the step, a good one does not, without asking the host."""
    need_kernel("adamw_")
    state = [[t.cuda() for t in ts] for ts in training_state(torch.bfloat16, torch.float32)]

    def clip_and_step() -> None:
        _, scale = optimizer.clip_grad_norm(state[1], 1.0)
        one_step(state, grad_scale=scale)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        clip_and_step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            clip_and_step()
        before = [p.clone() for p in state[0]]
        state[1][149][0] = float("inf")
        graph.replay()
        assert all(map(torch.equal, state[0], before))
        state[1][149][0] = 1.0
        graph.replay()
        assert not torch.equal(state[0][149], before[149])


def operands(m: int, n: int, k: int, positive: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * k)
    draw = torch.rand if positive else torch.randn
    x, w = (draw(rows, k, generator=generator).to(torch.bfloat16) for rows in (m, n))
    with deepseek_ops.backend("reference"):
        return (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))


GEMMS = [(1, 8, 128), (64, 128, 512), (129, 136, 144), (128, 576, 1536), (257, 2112, 7168)]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), GEMMS)
def test_fp8_gemm_bits(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    """Equal to the model of the tensor core, bit for bit."""
    need_kernel("fp8_gemm")
    given = operands(m, n, k)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_gemm(*given, out_dtype=out_dtype, accumulation="hopper")
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_gemm(*[t.cuda() for t in given], out_dtype=out_dtype, accumulation="hopper")
    assert same_bits(got.cpu(), want)


@pytest.mark.parametrize("k", [512, 4096, 16384])
def test_fp8_gemm_accuracy_on_positive_data(k: int) -> None:
    """A kernel without promotion loses 0.6 % to 25 % here."""
    need_kernel("fp8_gemm")
    a, scale_a, b, scale_b = (t.cuda() for t in operands(128, 128, k, positive=True))
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32).double()
    left = a.double() * scale_a.double().T.repeat_interleave(128, 1)
    right = b.double() * scale_b.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = left @ right.T
    assert abs(float((got - exact).mean() / exact.mean())) <= 1e-3


def test_fp8_gemm_repeat() -> None:
    """Twenty runs, one answer."""
    need_kernel("fp8_gemm")
    given = [t.cuda() for t in operands(515, 1152, 2048)]
    with deepseek_ops.backend("cuda"):
        first = gemm.fp8_gemm(*given, out_dtype=torch.float32)
        assert all(same_bits(gemm.fp8_gemm(*given, out_dtype=torch.float32), first) for _ in range(20))


def test_fp8_gemm_graph() -> None:
    """Captured once, replayed on new data, on a stream that is not the default one."""
    need_kernel("fp8_gemm")
    first, second = ([t.cuda() for t in operands(256, 512, 1024, positive)] for positive in (False, True))
    static = [t.clone() for t in first]
    out = torch.empty(256, 512, device="cuda", dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_gemm(*static, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm.fp8_gemm(*static, out=out)
        for given in (first, second):
            for to, value in zip(static, given, strict=True):
                to.copy_(value)
            graph.replay()
            assert same_bits(out, gemm.fp8_gemm(*given))


DECODES = [(1, 8, 128), (7, 136, 1536), (16, 2112, 7168), (33, 576, 144), (64, 4096, 2048)]


@pytest.mark.parametrize("split_k", [None, 1, 2, 4, 8])
@pytest.mark.parametrize(("m", "n", "k"), DECODES)
def test_fp8_gemm_decode_bits(m: int, n: int, k: int, split_k: int | None) -> None:
    """Equal to the model of the tensor core with the same ranges of K, with and without early weights."""
    need_kernel("fp8_gemm_decode")
    given = operands(m, n, k)
    for out_dtype in (torch.float32, torch.bfloat16):
        with deepseek_ops.backend("modelled"):
            want = gemm.fp8_gemm_decode(*given, out_dtype=out_dtype, split_k=split_k)
        on_device = [t.cuda() for t in given]
        torch.cuda.synchronize()  # the weights are there: they may be loaded early
        for prefetch in (False, True):
            with deepseek_ops.backend("cuda"):
                got = gemm.fp8_gemm_decode(
                    *on_device, out_dtype=out_dtype, split_k=split_k, prefetch_weights=prefetch
                )
            assert same_bits(got.cpu(), want)


def test_fp8_gemm_decode_batch() -> None:
    """Rows alone, in small and in large batches: one answer."""
    need_kernel("fp8_gemm_decode")
    a, scale_a, b, scale_b = (t.cuda() for t in operands(64, 4096, 7168))
    with deepseek_ops.backend("cuda"):
        whole = gemm.fp8_gemm_decode(a, scale_a, b, scale_b, out_dtype=torch.float32)
        for first, past in ((0, 4), (8, 16), (32, 64), (60, 64)):
            part = gemm.fp8_gemm_decode(
                a[first:past], scale_a[:, first:past].contiguous(), b, scale_b, out_dtype=torch.float32
            )
            assert same_bits(part, whole[first:past])


def batch(groups: int, room: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(groups + room + n + k)
    with deepseek_ops.backend("reference"):
        rows = [quantize.quantize_1x128(torch.randn(room, k, generator=generator)) for _ in range(groups)]
        return (
            *(torch.stack(x) for x in zip(*rows, strict=True)),
            *quantize.quantize_128x128(torch.randn(groups, n, k, generator=generator)),
        )


@pytest.mark.parametrize(
    ("counts", "room"), [([0, 9, 0, 64], 64), ([1] * 8, 8), ([0, 0], 16), ([3, 0, 32, 17], 32)]
)
def test_fp8_gemm_masked_decode_bits(counts: list[int], room: int) -> None:
    """Empty groups among others; rows past the counts are zero, or stay in `out`."""
    need_kernel("fp8_gemm_masked_decode")
    given = (*batch(len(counts), room, 576, 1536), torch.tensor(counts, dtype=torch.int32))
    with deepseek_ops.backend("modelled"):
        want = gemm.fp8_gemm_masked_decode(*given)
    out = torch.full(want.shape, 7.0, dtype=torch.bfloat16, device="cuda")
    with deepseek_ops.backend("cuda"):
        assert same_bits(gemm.fp8_gemm_masked_decode(*[t.cuda() for t in given]).cpu(), want)
        gemm.fp8_gemm_masked_decode(*[t.cuda() for t in given], out=out)
    for g, count in enumerate(counts):
        assert same_bits(out[g, :count].cpu(), want[g, :count]) and bool((out[g, count:] == 7).all())


def test_fp8_gemm_decode_graph() -> None:
    """Captured once, replayed on new data: the same bits as a plain call, each time."""
    need_kernel("fp8_gemm_decode")
    first, second = ([t.cuda() for t in operands(32, 4096, 7168, positive)] for positive in (False, True))
    static = [t.clone() for t in first]
    out = torch.empty(32, 4096, device="cuda", dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_gemm_decode(*static, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm.fp8_gemm_decode(*static, out=out)
        for given in (first, second):
            for to, value in zip(static, given, strict=True):
                to.copy_(value)
            for _ in range(20):
                graph.replay()
                assert same_bits(out, gemm.fp8_gemm_decode(*given))


def test_fp8_gemm_masked_decode_graph() -> None:
    """The counts change between replays of one graph."""
    need_kernel("fp8_gemm_masked_decode")
    given = [t.cuda() for t in batch(8, 16, 576, 1536)]
    masked_m = torch.zeros(8, dtype=torch.int32, device="cuda")
    out = torch.zeros(8, 16, 576, device="cuda", dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_gemm_masked_decode(*given, masked_m, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm.fp8_gemm_masked_decode(*given, masked_m, out=out)
        for counts in ([16] * 8, [0, 3, 0, 16, 1, 0, 0, 9], [0] * 8):
            masked_m.copy_(torch.tensor(counts, dtype=torch.int32))
            want = gemm.fp8_gemm_masked_decode(*given, masked_m)
            for _ in range(20):
                out.zero_()
                graph.replay()
                assert same_bits(out, want)


def wgrad_operands(m: int, n: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * tokens + seed)
    with deepseek_ops.backend("reference"):
        pieces = [quantize.quantize_1x128(torch.randn(rows, tokens, generator=generator)) for rows in (m, n)]
    return [t for piece in pieces for t in piece]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "tokens"), [(1, 8, 128), (64, 128, 512), (129, 136, 144), (257, 1408, 2048)]
)
def test_fp8_wgrad_bits(m: int, n: int, tokens: int, out_dtype: torch.dtype) -> None:
    """Equal to the model of the tensor core, bit for bit, overwriting and accumulating, with every tile."""
    need_kernel("fp8_wgrad")
    given = wgrad_operands(m, n, tokens)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_wgrad(*given, accumulation="hopper")
    old = torch.randn(m, n).to(out_dtype)
    for tile in (None, *FP8_WGRAD_TILES):
        out = old.cuda()
        with deepseek_ops.backend("cuda"):
            got = gemm.fp8_wgrad(*[t.cuda() for t in given], out_dtype=out_dtype, tile=tile)
            gemm.fp8_wgrad(*[t.cuda() for t in given], out=out, accumulate=True, tile=tile)
        assert same_bits(got.cpu(), want.to(out_dtype))
        assert same_bits(out.cpu(), (old.float() + want).to(out_dtype))


WGRAD_GROUPS = {
    "experts_of_128": [128] * 8,
    "odd_tiles": [128, 256],
    "one_hot": [0, 0, 1024, 0],
    "all_empty": [0, 0, 0],
    "ragged": [0, 640, 128, 0, 0, 384, 128, 0],
}


@pytest.mark.parametrize("sizes", WGRAD_GROUPS.values(), ids=WGRAD_GROUPS.keys())
def test_fp8_wgrad_grouped_bits(sizes: list[int]) -> None:
    """Every group bit for bit; what groups without tokens own stays as it was."""
    need_kernel("fp8_wgrad_grouped")
    bounds = [0, *itertools.accumulate(sizes)]
    given = wgrad_operands(192, 328, bounds[-1] + 128)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    old = torch.randn(len(sizes), 192, 328)
    with deepseek_ops.backend("reference"):
        want = gemm.fp8_wgrad_grouped(*given, offsets, accumulation="hopper")
        added = old.clone()
        gemm.fp8_wgrad_grouped(*given, offsets, out=added, accumulate=True, accumulation="hopper")
    out = old.cuda()
    with deepseek_ops.backend("cuda"):
        got = gemm.fp8_wgrad_grouped(*[t.cuda() for t in (*given, offsets)])
        gemm.fp8_wgrad_grouped(*[t.cuda() for t in (*given, offsets)], out=out, accumulate=True)
    assert same_bits(got.cpu(), want) and same_bits(out.cpu(), added)


def test_fp8_wgrad_repeat() -> None:
    """Twenty runs, one answer."""
    given = [t.cuda() for t in wgrad_operands(1408, 1408, 2048)]
    with deepseek_ops.backend("cuda"):
        first = gemm.fp8_wgrad(*given)
        assert all(same_bits(gemm.fp8_wgrad(*given), first) for _ in range(20))


def test_fp8_wgrad_grouped_repeat() -> None:
    """The same with experts of 128 tokens, on which others raced (DeepGEMM 365)."""
    given = [t.cuda() for t in wgrad_operands(1408, 1408, 2048)]
    given.append(torch.arange(0, 2049, 128, dtype=torch.int32, device="cuda"))
    with deepseek_ops.backend("cuda"):
        first = gemm.fp8_wgrad_grouped(*given)
        assert all(same_bits(gemm.fp8_wgrad_grouped(*given), first) for _ in range(20))


def test_fp8_wgrad_grouped_graph() -> None:
    """Captured once, replayed with other offsets: nothing of them is read on the host."""
    need_kernel("fp8_wgrad_grouped")
    given = [t.cuda() for t in wgrad_operands(256, 384, 1024)]
    many = [torch.tensor(o, dtype=torch.int32).cuda() for o in ([0, 128, 1024, 1024], [0, 0, 512, 640])]
    offsets, out = many[0].clone(), torch.empty(3, 256, 384, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        gemm.fp8_wgrad_grouped(*given, offsets, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            gemm.fp8_wgrad_grouped(*given, offsets, out=out)
        for value in many:
            offsets.copy_(value)
            graph.replay()
            assert same_bits(out, gemm.fp8_wgrad_grouped(*given, value))


def moe_arguments(kernel: str, tokens: int, hidden: int) -> tuple[tuple, ...]:
    """Arguments of one op of the MoE plumbing, on the CPU; 64 experts, 8 groups, 4 open, 6 experts a token."""
    generator = torch.Generator().manual_seed(tokens + hidden)
    logits = torch.randn(tokens, 64, generator=generator)
    bias = torch.randn(64, generator=generator) * 0.01
    with deepseek_ops.backend("modelled"):
        topk_idx, weight, scores, _ = moe._route(logits, bias, 6, 8, 4, 2.5, True)
        x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        here = torch.where(topk_idx < 32, topk_idx, -1)  # half of the experts are another rank's
        y, _, source = moe._permute(x, here, 32)
        quantized = quantize.quantize_1x128(x)
    cu = torch.tensor([0, tokens // 3, tokens // 3, tokens - tokens // 7], dtype=torch.int32)
    return {
        "route": (logits, bias, 6, 8, 4, 2.5, True),
        "route_backward": (torch.randn(tokens, 6, generator=generator), logits, scores, topk_idx, 2.5, True),
        "balance_loss": (scores, topk_idx, cu, 0.1, "unbiased"),
        "permute": (x, here, 32),
        "permute_quantized": (*quantized, here, 32),
        "unpermute": (y, source, tokens, 6, weight),
        "unpermute_backward": (x, y, source, 6, weight),
    }[kernel]


def on_gpu(arguments: tuple) -> tuple:
    return tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)


def tensors(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 128), (7, 72), (129, 7168), (4097, 256), (70000, 16)])
@pytest.mark.parametrize("kernel", MOE_KERNELS)
def test_moe_results(kernel: str, tokens: int, hidden: int) -> None:
    """Permutations to the byte. Elsewhere the device's exponential and reciprocal stand between us and the model
    (docs/numerics.md: 2^-21 each), so that two scores closer than that may change places."""
    need_kernel(kernel)
    arguments = moe_arguments(kernel, tokens, hidden)
    with deepseek_ops.backend("modelled"):
        want = tensors(OPS[kernel](*arguments))
    with deepseek_ops.backend("cuda"):
        got = tensors(OPS[kernel](*on_gpu(arguments)))
    for g, w in zip(got, want, strict=True):
        if kernel in ("permute", "permute_quantized", "unpermute", "unpermute_backward"):
            assert same_bits(g.cpu(), w)
        elif g.is_floating_point() and kernel != "route":
            torch.testing.assert_close(g.cpu(), w, rtol=1e-5, atol=1e-6)
    if kernel == "route":
        topk_idx, weight, scores, counts = (g.cpu() for g in got)
        torch.testing.assert_close(scores, want[2], rtol=2.0**-19, atol=0)
        same = (topk_idx == want[0]).all(1)
        assert same.double().mean() > 0.999
        torch.testing.assert_close(weight[same], want[1][same], rtol=2.0**-18, atol=0)
        assert torch.equal(counts, torch.bincount(topk_idx.flatten(), minlength=64))


@pytest.mark.parametrize("kernel", MOE_KERNELS)
def test_moe_repeat(kernel: str) -> None:
    """Twenty runs, one answer."""
    need_kernel(kernel)
    arguments = on_gpu(moe_arguments(kernel, 5000, 512))
    with deepseek_ops.backend("cuda"):
        first = tensors(OPS[kernel](*arguments))
        for _ in range(20):
            assert all(same_bits(a, b) for a, b in zip(tensors(OPS[kernel](*arguments)), first, strict=True))


def test_moe_graph() -> None:
    """Route, there and back, captured once and replayed on other logits."""
    need_kernel("permute")
    first, second = (torch.randn(300, 64, device="cuda") for _ in range(2))
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    logits, bias = first.clone(), torch.zeros(64, device="cuda")

    def layer() -> torch.Tensor:
        topk_idx, weight, _, counts = moe.route(logits, bias, top_k=6, num_groups=8, top_groups=4)
        x_perm, _, source = moe.permute(x, topk_idx, 64)
        moe.update_bias_(bias, counts, speed=0.0)
        return moe.unpermute(x_perm, source, 300, 6, weight)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deepseek_ops.backend("cuda"):
        layer()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = layer()
        for given in (first, second):
            logits.copy_(given)
            graph.replay()
            assert same_bits(out, layer())
