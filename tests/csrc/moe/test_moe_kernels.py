"""The MoE kernels against `modelled`, bit for bit, one case for every path through the kernels.

The public tests (tests/test_moe*.py) hold both to scalar definitions; here each case is chosen by what the kernel does
with it: how lanes share the experts, 16-byte loads or single elements, blocks and warps of the plan.
"""

from __future__ import annotations

import math

import pytest
import torch

import deepseek_ops
from deepseek_ops import ArgumentError, moe, quantize
from deepseek_ops._registry import absent_reason

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def same_bits(a, b):
    """Equal bytes; any NaN equals any NaN, whose sign and payload are the machine's."""
    assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
    integer = INTEGERS[a.element_size()]
    equal = a.view(integer) == b.contiguous().view(integer)
    if a.dtype in (torch.float32, torch.bfloat16):
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


@pytest.fixture(params=["emulated", "checked"])
def kernels(request):
    """`run(op, *arguments)`: the op from the kernels, after comparing it with `modelled`."""
    reason = absent_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param} is absent: {reason}")

    def compare(op, *arguments):
        with deepseek_ops.backend("modelled"):
            want = op(*arguments)
        with deepseek_ops.backend(request.param):
            got = op(*arguments)
        pairs = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True)
        for index, (a, b) in enumerate(pairs):
            assert same_bits(a, b), f"{op.name}: output {index} differs"
        return got

    compare.backend = request.param
    return compare


# Experts, groups, top_groups, top_k: DeepSeek-V3, -V2, Kimi-K2; sizes that 4 does not divide; lanes that hold nothing
# (3 groups), a whole group each (17 of them, 32 values a lane), one expert each.
ROUTERS = [
    (256, 8, 4, 8), (160, 8, 3, 6), (384, 1, 1, 8), (512, 1, 1, 16), (64, 1, 1, 32), (12, 3, 2, 5), (510, 17, 5, 16),
    (512, 32, 32, 8), (512, 32, 3, 8), (32, 32, 4, 3), (33, 11, 4, 7), (7, 1, 1, 7), (1, 1, 1, 1), (128, 2, 1, 4),
]  # fmt: skip
ROUTER = pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(map(str, r)))
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])


def shifted(x):
    """The same values, one element off a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def spaced(x):
    """The same values with 16 columns between rows."""
    return torch.cat([x, x.new_zeros(x.shape[0], 16)], 1)[:, : x.shape[1]]


def turned(x):
    """The same values with rows contiguous."""
    return x.t().contiguous().t()


LAYOUTS = [lambda x: x, shifted, spaced, turned]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=["dense", "shifted", "spaced", "turned"])


@NORMALIZE
@ROUTER
def test_route_and_its_gradient(kernels, router, normalize):
    experts, groups, top_groups, top_k = router
    tokens = 9
    logits = torch.randn(tokens, experts, generator=generator(experts))
    logits[3] = logits[3].round()  # ties
    logits[4] = 0
    bias = torch.randn(experts, generator=generator(1)) * 0.05
    bias[::3] = 0
    options = (2.5, normalize)
    topk_idx, _, scores, counts = kernels(moe._route, logits, bias, top_k, groups, top_groups, *options)
    assert counts.sum() == tokens * top_k
    dweight = torch.randn(tokens, top_k, generator=generator(2))
    dscores = torch.randn(tokens, experts, generator=generator(3))
    kernels(moe._route_backward, dweight, dscores, scores, topk_idx, *options)


@LAYOUT
def test_route_takes_any_strides(kernels, layout):
    logits = layout(torch.randn(6, 64, generator=generator(4)))
    bias = torch.randn(64, 2, generator=generator(5))[:, 0]
    for b in (bias, bias.contiguous(), shifted(bias[None])[0]):
        topk_idx, _, scores, _ = kernels(moe._route, logits, b, 4, 8, 4, 1.0, True)
    grads = (
        layout(torch.randn(6, 64, generator=generator(6))),
        layout(torch.randn(6, 4, generator=generator(7))),
    )
    kernels(moe._route_backward, grads[1], grads[0], layout(scores), layout(topk_idx), 1.0, True)
    zero = torch.zeros(1).expand(6, 64)  # what autograd hands over when nobody used the scores
    kernels(moe._route_backward, grads[1], zero, scores, topk_idx, 1.0, True)


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf, 100.0, -100.0, 0.0, -0.0])
def test_special_logits(kernels, special):
    for groups, top_groups in ((1, 1), (8, 3)):
        logits = torch.randn(4, 32, generator=generator(8))
        logits[0, 7] = logits[1, 5::6] = special
        logits[2] = special
        topk_idx, _, scores, _ = kernels(
            moe._route, logits, torch.zeros(32), 6, groups, top_groups, 2.5, True
        )
        assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 32 for row in topk_idx.tolist())
        ones = torch.ones(4, 6), torch.ones(4, 32)
        kernels(moe._route_backward, *ones, scores, topk_idx, 2.5, True)
        cu = torch.tensor([0, 3], dtype=torch.int32)
        for selection in ("biased", "unbiased"):
            kernels(moe._balance_loss, scores, topk_idx, cu, 0.1, selection)


def test_special_biases(kernels):
    bias = torch.tensor([math.nan, -math.nan, -math.inf, math.inf] + [-3.0] * 12)
    for top_groups in (1, 2, 4):
        kernels(moe._route, torch.randn(3, 16), bias, 4, 4, top_groups, 1.0, True)


@pytest.mark.parametrize("experts", [1, 6, 8, 60, 256, 264, 510, 512])
@pytest.mark.parametrize("selection", ["biased", "unbiased"])
def test_balance_loss(kernels, experts, selection):
    tokens, top_k = 43, min(experts, 8)
    scores = torch.rand(tokens, experts, generator=generator(experts))
    scores[5] = 0.5  # ties
    topk_idx = torch.rand(tokens, experts, generator=generator(1)).argsort(1)[:, :top_k].contiguous()
    for borders in ([0, 43], [0, 7, 7, 7, 20, 41], [3, 9, 30], [0], [0, 0, 0], [50, 60]):
        cu = torch.tensor(borders, dtype=torch.int32)
        kernels(moe._balance_loss, scores, topk_idx, cu, 0.3, selection)
    for layout in LAYOUTS[1:]:
        kernels(
            moe._balance_loss, layout(scores), layout(topk_idx), cu.repeat_interleave(2)[::2], 0.3, selection
        )


@pytest.mark.parametrize("experts", [0, 1, 7, 256, 300])
def test_update_bias(kernels, experts):
    counts = torch.randint(0, 2**40, (experts, 2), generator=generator(9))[:, 0]
    bias = torch.randn(experts, generator=generator(10))
    with deepseek_ops.backend("reference"):
        want = moe.update_bias_(bias.clone(), counts, speed=0.001)
    with deepseek_ops.backend(kernels.backend):
        got = moe.update_bias_(bias, counts, speed=0.001)
    assert got is bias and same_bits(got, want)


# ---- permutations --------------------------------------------------------------------------------------------------


def assignment(tokens, top_k, experts, seed, missing=0.1):
    idx = torch.randint(0, experts, (tokens, top_k), generator=generator(seed))
    idx[torch.rand(tokens, top_k, generator=generator(seed + 1)) < missing] = -1
    return idx


ROWS = pytest.mark.parametrize(
    ("dtype", "columns"),
    [
        (torch.bfloat16, 8),
        (torch.bfloat16, 1064),
        (torch.bfloat16, 13),
        (torch.float32, 20),
        (torch.float32, 7),
    ],
    ids=str,
)


@LAYOUT
@ROWS
@pytest.mark.parametrize(("top_k", "experts"), [(1, 1), (3, 5), (8, 40), (9, 300)])
def test_there_and_back(kernels, top_k, experts, dtype, columns, layout):
    tokens = 7
    x = layout(torch.randn(tokens, columns, generator=generator(columns)).to(dtype))
    topk_idx = layout(assignment(tokens, top_k, experts, 11))
    x_perm, _, source = kernels(moe._permute, x, topk_idx, experts)
    y, weights = layout(x_perm * 1.25), layout(torch.randn(tokens, top_k, generator=generator(12)))
    out = kernels(moe._unpermute, y, source, tokens, top_k, weights)
    kernels(moe._unpermute, y, source, tokens, top_k, None)
    dout = layout(torch.randn(out.shape, generator=generator(13)).to(dtype))
    kernels(moe._unpermute_backward, dout, y, source, top_k, weights)
    kernels(moe._unpermute_backward, dout, None, source, top_k, None)
    kernels(moe._unpermute_backward, dout[:1].expand(tokens, -1), y, source, top_k, weights)


@pytest.mark.parametrize("columns", [1, 16, 128, 130, 272, 1200])
def test_quantized_rows(kernels, columns):
    for tokens, top_k in ((1, 1), (5, 3), (70, 4)):
        q, scale = quantize.quantize_1x128(torch.randn(tokens, columns, generator=generator(14)))
        topk_idx = assignment(tokens, top_k, 6, 15)
        kernels(moe._permute_quantized, q, scale, topk_idx, 6)
        kernels(
            moe._permute_quantized,
            q.view(torch.uint8).t().contiguous().t().view(q.dtype),
            spaced(scale),
            topk_idx,
            6,
        )


def test_fp64_rows_are_moved(kernels):
    kernels(moe._permute, torch.randn(5, 3, dtype=torch.float64), assignment(5, 2, 4, 16), 4)


@pytest.mark.parametrize("tokens", [0, 1, 31, 128, 129, 1100])
def test_plans(kernels, tokens):
    """One warp, many, and two blocks of 32 that share their counts through distributed shared memory."""
    for experts in (2, 63, 64, 1000):
        topk_idx = assignment(tokens, 4, experts, 17)
        kernels(moe._permute, torch.arange(tokens).bfloat16()[:, None], topk_idx, experts)


@pytest.mark.parametrize("name", ["one_expert", "last_expert", "nobody", "duplicates", "nonsense"])
def test_skewed_plans(kernels, name):
    tokens, top_k, experts = 90, 4, 10
    topk_idx = {
        "one_expert": torch.zeros(tokens, top_k, dtype=torch.int64),
        "last_expert": torch.full((tokens, top_k), experts - 1),
        "nobody": torch.full((tokens, top_k), -1),
        "duplicates": (torch.arange(tokens) % experts)[:, None].expand(tokens, top_k),
        "nonsense": torch.tensor([-(2**63), 2**63 - 1, 2**32, experts]).expand(tokens, top_k),
    }[name]
    _, offsets, source = kernels(moe._permute, torch.randn(tokens, 8), topk_idx, experts)
    if name in ("nobody", "nonsense"):
        assert offsets.tolist() == [0] * (experts + 1) and torch.equal(source, torch.arange(tokens * top_k))


def test_most_experts(kernels):
    kernels(moe._permute, torch.randn(40, 2), assignment(40, 3, 4096, 18), 4096)


def test_empty(kernels):
    none = torch.zeros(0, 4, dtype=torch.int64)
    kernels(moe._route, torch.zeros(0, 8), torch.zeros(8), 4, 2, 1, 1.0, True)
    kernels(moe._route_backward, torch.zeros(0, 4), torch.zeros(0, 8), torch.zeros(0, 8), none, 1.0, True)
    kernels(moe._balance_loss, torch.zeros(0, 8), none, torch.zeros(1, dtype=torch.int32), 1.0, "biased")
    kernels(moe._permute, torch.zeros(0, 5), none, 3)
    kernels(moe._permute, torch.zeros(2, 0), torch.zeros(2, 2, dtype=torch.int64), 3)
    kernels(moe._permute_quantized, *quantize.quantize_1x128(torch.zeros(0, 5)), none, 3)
    kernels(moe._unpermute, torch.zeros(4, 0), torch.arange(4), 2, 2, torch.ones(2, 2))
    kernels(
        moe._unpermute_backward, torch.zeros(2, 0), torch.zeros(4, 0), torch.arange(4), 2, torch.ones(2, 2)
    )


# ---- what nobody has checked on the host ---------------------------------------------------------------------------


def with_canaries(x, value):
    """A contiguous tensor of x's shape in the middle of a larger one, and a check that the rest is untouched."""
    room = torch.full((x.numel() + 128,), value, dtype=x.dtype)

    def check():
        assert (room[:64] == value).all() and (room[64 + x.numel() :] == value).all()

    return room[64 : 64 + x.numel()].view(x.shape), check


def run_natively(backend, name, arguments, outputs, workspaces=()):
    """The kernel on outputs of ours, each with canaries around it."""
    module = pytest.importorskip(f"deepseek_ops._native.{backend}")
    framed = [with_canaries(o, 77) for o in (*outputs, *workspaces)]
    with deepseek_ops.backend(backend):
        getattr(module, name)(*arguments, *(tensor for tensor, _ in framed))
    for _, check in framed:
        check()
    return [tensor for tensor, _ in framed[: len(outputs)]]


NONSENSE = torch.tensor([-1, -(2**63), 2**63 - 1, 2**31, 3, 12, 11, 12 + 2**32])


def test_nonsense_never_leaves_the_tensors(kernels):
    """Indices, sources and borders that are none. Canaries around every output; `checked` sees single accesses."""
    scores = torch.rand(8, 12, generator=generator(19))
    topk_idx = torch.stack([NONSENSE, NONSENSE.flip(0)], 1)
    grads = torch.rand(8, 2), torch.rand(8, 12)
    one_each = torch.stack([NONSENSE, torch.full_like(NONSENSE, -7)], 1)  # an expert twice would be a race
    run_natively(kernels.backend, "route_backward", (*grads, scores, one_each, 1.0, True), [scores])
    for borders in ([0, -5, 2**31 - 1, 3], [7, 3, 1, 100], [-(2**31)] * 4):
        cu = torch.tensor(borders, dtype=torch.int32)
        counts = torch.zeros(3 * 12 + 1, dtype=torch.int32)
        for selection in ("biased", "unbiased"):
            run_natively(
                kernels.backend, "balance_loss", (scores, topk_idx, cu, 0.1, selection), [torch.zeros(()), scores],
                [counts, torch.zeros(8)],
            )  # fmt: skip
    rows = torch.zeros(8, dtype=torch.int32)
    x = torch.randn(4, 16)
    outputs = [torch.zeros(8, 16), torch.zeros(13, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)]
    run_natively(kernels.backend, "permute", (x, topk_idx[:4], 12), outputs, [rows])
    weights = torch.rand(8, 1)
    source = torch.tensor([-1, 2**40, 8, -(2**63), 4, 5, 6, 7])  # rows 0 to 3 are named by nobody
    y = torch.randn(8, 16)
    run_natively(kernels.backend, "unpermute", (y, source, 8, 1, weights), [torch.zeros(8, 16)], [rows])
    if kernels.backend == "emulated":  # two tokens fall on one row, which `checked` rightly calls a race
        outputs = [torch.zeros(8, 16), torch.zeros(8, 1)]
        run_natively(kernels.backend, "unpermute_backward", (y, y, source, 1, weights), outputs, [rows])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        (
            "logits: must be float32",
            lambda: moe.route(torch.zeros(2, 8).double(), torch.zeros(8).double(), top_k=1),
        ),
        ("logits: must be in 1..512", lambda: moe.route(torch.zeros(2, 513), torch.zeros(513), top_k=1)),
        ("top_k: must be in 1..32", lambda: moe.route(torch.zeros(2, 64), torch.zeros(64), top_k=33)),
        (
            "num_groups: must be in 1..32",
            lambda: moe.route(torch.zeros(2, 66), torch.zeros(66), top_k=1, num_groups=33, top_groups=2),
        ),
        (
            "num_experts: must be in 1..4096",
            lambda: moe.permute(torch.zeros(2, 8), torch.zeros(2, 1).long(), 4097),
        ),
        (
            "y: must be bfloat16 or float32",
            lambda: moe.unpermute(torch.zeros(2, 8).double(), torch.arange(2), 2, 1),
        ),
        (
            "top_k: must be in 1..1024",
            lambda: moe._unpermute_backward(
                torch.zeros(1, 2), torch.zeros(1025, 2), torch.arange(1025), 1025, torch.zeros(1, 1025)
            ),
        ),
    ],
)
def test_what_the_kernels_refuse(kernels, argument, call):
    with deepseek_ops.backend(kernels.backend), pytest.raises(ArgumentError, match=f"^{argument}"):
        call()


# ---- execution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["random", "starve", "pct"])
@pytest.mark.parametrize("asynchrony", ["lazy", "eager"])
def test_the_same_bits_on_every_schedule(kernels, schedule, asynchrony):
    logits = torch.randn(33, 64, generator=generator(24))
    for seed in range(3):
        with deepseek_ops.emulation(seed=seed, schedule=schedule, asynchrony=asynchrony):
            topk_idx, weight, scores, _ = kernels(moe._route, logits, torch.zeros(64), 6, 4, 2, 2.5, True)
            kernels(moe._route_backward, weight, scores, scores, topk_idx, 2.5, True)
            cu = torch.tensor([0, 9, 30], dtype=torch.int32)
            kernels(moe._balance_loss, scores, topk_idx, cu, 0.1, "unbiased")
            x_perm, _, source = kernels(moe._permute, logits, topk_idx, 64)
            kernels(moe._unpermute, x_perm, source, 33, 6, weight)
            kernels(moe._unpermute_backward, logits, x_perm, source, 6, weight)


def test_a_layer_of_deepseek_v3(kernels):
    """256 experts in 8 groups, 4 of them open, 8 experts a token; bf16 rows there and back, FP8 rows there."""
    tokens, experts, top_k, hidden = 24, 256, 8, 7168
    logits = torch.randn(tokens, experts, generator=generator(25))
    bias = torch.randn(experts, generator=generator(26)) * 0.01
    topk_idx, weight, _, counts = kernels(moe._route, logits, bias, top_k, 8, 4, 2.5, True)
    assert ((topk_idx // 32).sort(1).values.diff(dim=1) != 0).sum(1).max() <= 3  # at most 4 groups
    x = torch.randn(tokens, hidden, generator=generator(27)).bfloat16()
    x_perm, offsets, source = kernels(moe._permute, x, topk_idx, experts)
    assert torch.equal(offsets.diff().long(), counts)
    kernels(moe._unpermute, x_perm, source, tokens, top_k, weight)
    kernels(moe._permute_quantized, *quantize.quantize_1x128(x), topk_idx, experts)
