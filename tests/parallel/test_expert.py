"""Expert parallelism on 2 to 4 processes against one process that has all tokens: the same rows, bits and gradients."""

import pytest
import torch

from deepseek_ops import ArgumentError
from deepseek_ops.activation import swiglu
from deepseek_ops.gemm import gemm_grouped
from deepseek_ops.moe import permute, route, unpermute
from deepseek_ops.nn import Fp8Experts
from deepseek_ops.parallel.expert import Bounded, CapacityError, ExpertParallel
from deepseek_ops.parallel.faults import ParallelError
from deepseek_ops.parallel.layout import Layout
from deepseek_ops.parallel.mesh import launch
from deepseek_ops.quantize import dequantize_1x128, quantize_1x128
from tests.parallel.rank import PATIENCE

D, INNER, TOP_K, EXPERTS = 136, 24, 3, 12
LAYOUTS = {
    "2 ranks": Layout(2, ep=2),
    "3 ranks": Layout(3, ep=3),
    "2 nodes of 1": Layout(2, ep=2, node_size=1),
    "2 nodes of 2": Layout(4, ep=4, node_size=2),
    "4 ranks": Layout(4, ep=4),
    "2 groups": Layout(4, ep=2),
}


def choices(kind, tokens, generator):
    """int64 [T, k] of every shape that routing takes, and some that only a bug or a mask makes."""
    random = torch.rand(tokens, EXPERTS, generator=generator)
    if kind == "node-limited with ties":
        logits = (random * 3).round()
        return route(logits, torch.zeros(EXPERTS), top_k=TOP_K, num_groups=4, top_groups=2)[0]
    if kind == "one expert":
        return torch.tensor([[7, -1, -1]]).repeat(tokens, 1)
    if kind == "empty experts":
        return random[:, :TOP_K].topk(TOP_K).indices + EXPERTS - TOP_K
    idx = random.topk(TOP_K).indices
    if kind == "elsewhere and twice":
        idx[::3, 1] = -1
        idx[1::4, 2] = EXPERTS
        idx[2::5, 2] = idx[2::5, 0]
        idx[3::7] = -1
    return idx


CASES = [
    ("uniform", (5, 9, 1, 4)),
    ("node-limited with ties", (8, 0, 6, 3)),
    ("one expert", (3, 4, 0, 2)),
    ("empty experts", (0, 6, 2, 1)),
    ("elsewhere and twice", (11, 8, 3, 9)),
    ("uniform", (0, 0, 0, 0)),
]


def inputs(case, ranks, dtype, seed=0):
    """Per rank: x, weights, idx, gradient of the output."""
    kind, sizes = case
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, D, generator=generator).to(dtype),
            torch.rand(n, TOP_K, generator=generator),
            choices(kind, n, generator),
            torch.randn(n, D, generator=generator).to(dtype),
        )
        for n in sizes[:ranks]
    ]


class PlainExperts(torch.nn.Module):
    """SwiGLU experts without FP8, rows sorted by expert."""

    def __init__(self, dtype, part=slice(None)):
        super().__init__()
        generator = torch.Generator().manual_seed(99)
        gate_up = torch.randn(EXPERTS, 2 * INNER, D, generator=generator) * 0.1
        down = torch.randn(EXPERTS, D, INNER, generator=generator) * 0.1
        self.gate_up = torch.nn.Parameter(gate_up[part].to(dtype).clone())
        self.down = torch.nn.Parameter(down[part].to(dtype).clone())

    def forward(self, x, row_weight, offsets):
        return gemm_grouped(swiglu(gemm_grouped(x, self.gate_up, offsets), row_weight), self.down, offsets)


def make_experts(kind, part=slice(None)):
    if kind != "fp8":
        return PlainExperts(torch.bfloat16 if kind == "bf16" else torch.float32, part)
    plain = PlainExperts(torch.float32, part)
    experts = Fp8Experts(plain.gate_up.shape[0], D, INNER)
    experts.load_state_dict(plain.state_dict())
    return experts


def dtype_of(kind):
    return torch.float32 if kind == "fp32" else torch.bfloat16


def layer(run, experts, x, weights, dout):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(x, weights)
    out.backward(dout)
    return {
        "out": out.detach(), "dx": x.grad, "dweights": weights.grad,
        "dgate_up": experts.gate_up.grad, "ddown": experts.down.grad,
    }  # fmt: skip


def one_process(parts, kind):
    """The path of one process, on the tokens of all ranks."""
    x, weights, idx, dout = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    experts = make_experts(kind)

    def run(a, w):
        if kind == "fp8":
            return experts.routed(a, w, idx)
        rows, offsets, source = permute(a, idx, EXPERTS)
        return unpermute(experts(rows, w.flatten()[source], offsets), source, idx.shape[0], TOP_K)

    return layer(run, experts, x, weights, dout)


def distributed(rendezvous, layout, kind, order, capacity=None):
    results = []
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        ep = ExpertParallel(mesh, EXPERTS, order=order, capacity=capacity, fp8=kind == "fp8")
        for case in CASES:
            # Each EP group has its own tokens; the ranks of the others have the same again.
            x, weights, idx, dout = inputs(case, layout.ep, dtype_of(kind))[mesh.where.ep]
            experts = make_experts(kind, slice(ep.local_experts.start, ep.local_experts.stop))
            result = layer(lambda a, w: ep.routed(experts, a, w, idx), experts, x, weights, dout)  # noqa: B023
            results.append(result)
    return results


def compare(layout, kind, ranks, same):
    for i, case in enumerate(CASES):
        parts = inputs(case, layout.ep, dtype_of(kind))
        want = one_process(parts, kind)
        sizes, share = [len(p[0]) for p in parts], EXPERTS // layout.ep
        for rank, result in enumerate(ranks):
            ep = layout.coordinates(rank).ep
            for name, got in result[i].items():
                if name.startswith(("dgate_up", "ddown")):
                    part = want[name][ep * share : (ep + 1) * share]
                else:
                    part = want[name].split(sizes)[ep]
                same(got, part, f"{case}, rank {rank}: {name}")


def equal(got, want, name):
    assert got.shape == want.shape and torch.equal(got, want), name


def close(rtol):
    def check(got, want, name):
        assert got.shape == want.shape, name
        scale = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * scale, msg=name)

    return check


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["2 ranks", "2 nodes of 2", "2 groups"])
def test_by_slots_every_bit_is_that_of_one_process(world, name, kind):
    layout = LAYOUTS[name]
    compare(layout, kind, world(layout.world, distributed, layout, kind, "slots"), equal)


@pytest.mark.parametrize("name", ["3 ranks", "2 nodes of 1", "2 nodes of 2"])
def test_the_tree_differs_by_the_order_of_the_sum_alone(world, name):
    layout = LAYOUTS[name]
    compare(layout, "fp32", world(layout.world, distributed, layout, "fp32", "tree"), close(1e-6))


@pytest.mark.parametrize("order", ["slots", "tree"])
def test_bounded_buffers_that_suffice_change_nothing(world, order):
    layout = LAYOUTS["2 nodes of 2"]
    bounded = Bounded(max_tokens=12, max_rows=200)
    ranks = world(4, distributed, layout, "bf16", order, bounded)
    exact = world(4, distributed, layout, "bf16", order)
    for got, want in zip(ranks, exact, strict=True):
        for a, b in zip(got, want, strict=True):
            for name in a:
                equal(a[name], b[name], name)


def sums(rendezvous, layout):
    """What combine makes of rows that say which (rank, row) they are, in bf16, and what was sent for it."""
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        _, _, idx, _ = inputs(CASES[4], layout.ep, torch.bfloat16)[mesh.where.ep]
        ep = ExpertParallel(mesh, EXPERTS)
        plan = ep.plan(idx)
        generator = torch.Generator().manual_seed(mesh.rank)
        y = torch.randn(plan.num_rows, D, generator=generator).bfloat16()
        sent = plan.rail.send, plan.node.send, plan.rail.receive, plan.node.receive
        return y, ep.combine(y, plan), plan.offsets, sent


@pytest.mark.parametrize("name", ["3 ranks", "2 nodes of 2"])
def test_tree_by_hand_and_nothing_travels_twice(world, name):
    """Experts of a rank in FP32 by slot, to bf16; ranks of the node ascending, to bf16; nodes ascending, to bf16."""
    layout = LAYOUTS[name]
    share, local = EXPERTS // layout.ep, layout.local
    idx = [part[2] for part in inputs(CASES[4], layout.ep, torch.bfloat16)]
    results = world(layout.world, sums, layout)
    rows = {}  # (source rank, token, slot) -> row, by the documented order
    for rank, (y, _, offsets, _) in enumerate(results):
        entries = [
            (expert, source, token, slot)
            for source, part in enumerate(idx)
            for token, row in enumerate(part.tolist())
            for slot, expert in enumerate(row)
            if expert in range(rank * share, (rank + 1) * share)
        ]
        entries.sort()
        assert offsets.tolist() == [sum(e[0] < rank * share + i for e in entries) for i in range(share + 1)]
        for row, (_, *key) in enumerate(entries):
            rows[tuple(key)] = rank, y[row].float()
    for source, (_, out, _, _) in enumerate(results):
        for token, got in enumerate(out):
            mine = [rows.get((source, token, slot)) for slot in range(TOP_K)]
            total = torch.zeros(D)
            for node in range(layout.ep_nodes):
                in_node = torch.zeros(D)
                for rank in range(node * local, (node + 1) * local):
                    of_rank = torch.zeros(D)
                    for found in mine:
                        if found and found[0] == rank:
                            of_rank += found[1]
                    in_node += of_rank.bfloat16().float()
                total += in_node.bfloat16().float()
            assert torch.equal(got, total.bfloat16()), (source, token)
    for source, (*_, (rail, _, _, received)) in enumerate(results):
        visited = [{e // share for e in row if 0 <= e < EXPERTS} for row in idx[source].tolist()]
        assert rail == [sum(any(r // local == n for r in v) for v in visited) for n in range(layout.ep_nodes)]
        tokens = sum(
            any(e // share == source for e in row if 0 <= e < EXPERTS)
            for part in idx
            for row in part.tolist()
        )
        assert sum(received) == tokens  # once to a rank, however many of its experts are there


def overflow(rendezvous, layout, max_rows, policy, order):
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        x, weights, idx, dout = inputs(CASES[0], layout.ep, torch.float32)[mesh.where.ep]
        capacity = Bounded(max_tokens=9, max_rows=max_rows, overflow=policy)
        ep = ExpertParallel(mesh, EXPERTS, order=order, capacity=capacity)
        experts = make_experts("fp32", slice(ep.local_experts.start, ep.local_experts.stop))
        result = layer(lambda a, w: ep.routed(experts, a, w, idx), experts, x, weights, dout)
        return result | {"dropped": int(ep.plan(idx).dropped)}


@pytest.mark.parametrize("order", ["slots", "tree"])
def test_dropped_rows_add_nothing_and_are_counted(world, order):
    layout, most = LAYOUTS["2 ranks"], 20
    parts = inputs(CASES[0], 2, torch.float32)
    share, seen, dropped = EXPERTS // 2, [0, 0], [0, 0]
    kept = [part[2].clone() for part in parts]
    for part in kept:  # by source rank, token, slot
        for row in part:
            for slot, expert in enumerate(row.tolist()):
                seen[expert // share] += 1
                if seen[expert // share] > most:
                    dropped[expert // share] += 1
                    row[slot] = -1
    assert sum(dropped) > 0
    parts = [(x, w, idx, dout) for (x, w, _, dout), idx in zip(parts, kept, strict=True)]
    want = one_process(parts, "fp32")
    sizes = [len(p[0]) for p in parts]
    for rank, result in enumerate(world(2, overflow, layout, most, "drop", order)):
        assert result["dropped"] == dropped[rank]
        for name in ("out", "dx", "dweights"):
            (equal if order == "slots" else close(1e-6))(result[name], want[name].split(sizes)[rank], name)


def test_overflow_is_an_error_on_all_ranks(world):
    for rank, error in enumerate(world(2, overflow, LAYOUTS["2 ranks"], 20, "error", "tree", errors=True)):
        assert isinstance(error, CapacityError) and "max_rows" in str(error) and error.rank == rank
        assert error.suspects and "got 20" in str(error)


def pairs(rendezvous):
    layout = LAYOUTS["2 ranks"]
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        x, weights, idx, dout = inputs(CASES[0], 2, torch.bfloat16)[mesh.rank]
        ep = ExpertParallel(mesh, EXPERTS, fp8=True)
        plan = ep.plan(idx, num_sms=20)
        q, scale = quantize_1x128(x, pow2=True)
        (rows, scales), row_weight, offsets, _ = ep.dispatch((q, scale), plan, weights, num_sms=20)
        plain = ExpertParallel(mesh, EXPERTS)
        dense = plain.dispatch(x, plan, weights)
        want = quantize_1x128(dense.rows, pow2=True)
        assert torch.equal(rows.view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(scales, want[1])
        assert torch.equal(row_weight, dense.row_weight) and torch.equal(offsets, dense.offsets)
        # Tensors: what crossed was FP8, forward and as the gradient of combine; the sum itself was not.
        y = ep.dispatch(x, plan).rows.requires_grad_()
        assert torch.equal(y, dequantize_1x128(*want, dtype=x.dtype)) and not torch.equal(y, dense.rows)
        out = ep.combine(y, plan)
        assert torch.equal(out, plain.combine(y.detach(), plan))
        out.backward(dout)
        through = dequantize_1x128(*quantize_1x128(dout, pow2=True), dtype=dout.dtype)
        assert torch.equal(y.grad, plain.dispatch(through, plan).rows) and not torch.equal(through, dout)
        return True


def test_codes_arrive_as_they_were_sent(world):
    """Quantised at the source, GEMM-ready at the destination: the bytes that quantising there would give."""
    assert world(2, pairs) == [True, True]


def mismatch(rendezvous, what):
    _, rank, _ = rendezvous
    with launch(Layout(2, ep=2), rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        experts = EXPERTS if what != "experts" or rank == 0 else 2 * EXPERTS
        ep = ExpertParallel(mesh, experts)
        top_k = 3 if what != "top_k" or rank == 0 else 2
        ep.plan(torch.zeros(4, top_k, dtype=torch.int64))


@pytest.mark.parametrize("what", ["experts", "top_k"])
def test_ranks_that_disagree_all_hear_of_it(world, what):
    for error in world(2, mismatch, what, errors=True):
        assert isinstance(error, ParallelError) and error.suspects, error


def test_bad_arguments():
    with launch(Layout(1)) as mesh:
        ep = ExpertParallel(mesh, 4)
        plan = ep.plan(torch.zeros(3, 2, dtype=torch.int64))
        with pytest.raises(ArgumentError, match="topk_idx: must be int64"):
            ep.plan(torch.zeros(3, 2))
        with pytest.raises(ArgumentError, match="x: must have shape"):
            ep.dispatch(torch.zeros(2, 8), plan)
        with pytest.raises(ArgumentError, match="weights: must have shape"):
            ep.dispatch(torch.zeros(3, 8), plan, torch.zeros(3, 1))
        with pytest.raises(ArgumentError, match="y: must have shape"):
            ep.combine(torch.zeros(5, 8), plan)
        with pytest.raises(ArgumentError, match="num_sms: must be in"):
            ep.plan(torch.zeros(3, 2, dtype=torch.int64), num_sms=0)
        with pytest.raises(ArgumentError, match="order: must be one of"):
            ExpertParallel(mesh, 4, order="random")
        with pytest.raises(ArgumentError, match="max_tokens = 2"):
            ExpertParallel(mesh, 4, capacity=Bounded(2, 4)).plan(torch.zeros(3, 2, dtype=torch.int64))


def test_gradients_are_those_of_the_sums():
    """gradcheck of dispatch and combine with a map between them, in FP64."""
    with launch(Layout(1)) as mesh:
        torch.manual_seed(3)
        idx = torch.tensor([[0, 2], [1, -1], [2, 2]])
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        w = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        for order in ("tree", "slots"):
            ep = ExpertParallel(mesh, 3, order=order)
            plan = ep.plan(idx)

            def run(x, w, ep=ep, plan=plan):
                rows, weight, _, _ = ep.dispatch(x, plan, w)
                return ep.combine(rows.sin() * weight[:, None], plan)

            assert torch.autograd.gradcheck(run, (x, w))
