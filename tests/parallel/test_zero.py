"""ZeRO-1 against AdamW in one process that has every rank's gradients: masters, moments, parameters, norm."""

import math

import pytest
import torch

from deepseek_ops.optimizer import adamw_, clip_grad_norm
from deepseek_ops.parallel.faults import ParallelError
from deepseek_ops.parallel.layout import Layout
from deepseek_ops.parallel.mesh import launch
from deepseek_ops.parallel.zero import ZeroAdamW
from tests.parallel.rank import PATIENCE

STEPS, LR = 20, 1e-2
SHAPES = {"embed": (7, 5), "norm": (5,), "experts": (4, 3, 5), "experts_low": (4, 2, 3), "low": (11, 3), "idle": (3, 3), "large": (40, 5)}  # fmt: skip


def dtype_of(name):
    return torch.bfloat16 if "low" in name else torch.float32


def whole(name):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype_of(name))


def gradient(name, step, rank, micro):
    """Of one rank's tokens; large enough at times that the norm clips."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + 10 * rank + len(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype_of(name)) * (0.02 if step % 2 else 2.0)


def has_gradient(name, step):
    return name != "idle" or step > 10


def share(name, tensor, layout, ep):
    count = 4 // layout.ep
    return tensor[ep * count : (ep + 1) * count] if name.startswith("experts") else tensor


def train(rendezvous, layout, moments, bucket, max_norm, resume):
    """20 steps of two micro-batches; returns parameters, full state, norms."""
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        where = mesh.where
        params = {n: torch.nn.Parameter(share(n, whole(n), layout, where.ep).clone()) for n in SHAPES}

        def make():
            decay = {n: 0.1 if p.ndim > 1 else 0.0 for n, p in params.items()}
            return ZeroAdamW(
                params,
                mesh,
                is_expert=lambda n: n.startswith("experts"),
                moments=moments,
                weight_decay=decay,
                bucket=bucket,
            )

        optimizer, norms = make(), []
        for step in range(1, STEPS + 1):
            if resume and step == 8:
                state = optimizer.full_state()
                for p in params.values():
                    p.detach().zero_()
                optimizer = make()
                optimizer.load_full_state(state)
            for micro in range(2):
                for name, p in params.items():
                    if has_gradient(name, step) and not (name == "norm" and mesh.rank == 1):
                        grad = share(
                            name, gradient(name, step, layout.dp_index(mesh.rank), micro), layout, where.ep
                        )
                        p.grad = grad if p.grad is None else p.grad + grad
                optimizer.accumulate()
            norm, scale = optimizer.norm(max_norm)
            optimizer.step(step, LR, scale)
            optimizer.zero()
            norms.append(float(norm))
        kept = sum(piece.masters.numel() for piece in optimizer.pieces())
        return {n: p.detach() for n, p in params.items()}, optimizer.full_state(), norms, kept


def one_process(layout, moments, max_norm):
    """The same by `adamw_` on whole tensors."""
    params = {n: whole(n) for n in SHAPES}
    masters = {n: p.float() for n, p in params.items()}
    m = {n: torch.zeros_like(p, dtype=moments) for n, p in masters.items()}
    v = {n: torch.zeros_like(p, dtype=moments) for n, p in masters.items()}
    norms = []
    for step in range(1, STEPS + 1):
        names = [n for n in SHAPES if has_gradient(n, step)]
        grads = []
        for n in names:
            ranks = [r for r in range(layout.dp) if not (n == "norm" and r == 1)]
            sums = [gradient(n, step, r, 0).float() + gradient(n, step, r, 1).float() for r in ranks]
            if n.startswith("experts"):  # rank r of the test gives gradients of its own experts alone
                parts = [
                    sum_in_order(
                        [share(n, sums[i], layout, ep) for i in range(layout.dp) if i % layout.ep == ep]
                    )
                    for ep in range(layout.ep)
                ]
                grads.append(torch.cat(parts))
            else:
                grads.append(sum_in_order(sums))
        norm, scale = clip_grad_norm(grads, max_norm)
        adamw_([masters[n] for n in names], grads, [m[n] for n in names], [v[n] for n in names], lr=LR, step=step,
               weight_decay=[0.1 if masters[n].ndim > 1 else 0.0 for n in names], grad_scale=scale)  # fmt: skip
        norms.append(float(norm))
    return {"masters": masters, "exp_avg": m, "exp_avg_sq": v}, norms


def sum_in_order(tensors):
    total = tensors[0].clone()
    for t in tensors[1:]:
        total += t
    return total


@pytest.mark.parametrize(
    ("layout", "moments", "bucket", "max_norm", "resume"),
    [
        (Layout(2), torch.bfloat16, 1 << 24, math.inf, False),
        (Layout(3), torch.float32, 30, 1.0, False),
        (Layout(4, ep=2), torch.bfloat16, 64, 1.0, True),
        (Layout(4, ep=4), torch.bfloat16, 1, math.inf, False),
    ],
    ids=["DP2", "DP3", "DP4 EP2", "EP4"],
)
def test_twenty_steps_equal_one_process(world, layout, moments, bucket, max_norm, resume):
    state, norms = one_process(layout, moments, max_norm)
    results = world(layout.world, train, layout, moments, bucket, max_norm, resume)
    for rank, (params, full, seen, _) in enumerate(results):
        ep = layout.coordinates(rank).ep
        assert seen == pytest.approx(norms, rel=1e-6) and (max_norm == math.inf or max(norms) > max_norm)
        for kind in state:
            for name in SHAPES:
                got, want = full[kind][name], share(name, state[kind][name], layout, ep)
                if max_norm == math.inf:  # nothing depends on the norm: every bit is equal
                    assert torch.equal(got, want), (kind, name)
                else:
                    torch.testing.assert_close(
                        got, want, rtol=1e-6, atol=1e-6 if got.dtype == torch.float32 else 1e-2
                    )
        for name in SHAPES:
            assert torch.equal(params[name], full["masters"][name].to(dtype_of(name))), name
    # Each element of state is kept once in a group of replicas, and evenly up to padding.
    kept = [r[3] for r in results]
    dense = sum(math.prod(s) for n, s in SHAPES.items() if not n.startswith("experts"))
    expert = sum(math.prod(s) for n, s in SHAPES.items() if n.startswith("experts"))
    assert sum(kept) == dense + expert
    assert bucket == 1 or max(kept) - min(kept) <= 2 * len(SHAPES)


def poisoned(rendezvous):
    with launch(Layout(2), rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        p = torch.nn.Parameter(torch.ones(6))
        optimizer = ZeroAdamW({"p": p}, mesh, is_expert=lambda n: False)
        p.grad = torch.full((6,), math.nan if mesh.rank == 1 else 1.0)
        optimizer.accumulate()
        norm, scale = optimizer.norm(1.0)
        optimizer.step(1, LR, scale)
        return float(norm), float(scale), p.detach().tolist()


def test_a_nan_on_one_rank_stops_the_step_on_all(world):
    for norm, scale, p in world(2, poisoned):
        assert math.isnan(norm) and math.isnan(scale) and p == [1.0] * 6


def unequal(rendezvous):
    with launch(Layout(2), rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        ZeroAdamW({"p": torch.nn.Parameter(torch.ones(6 + mesh.rank))}, mesh, is_expert=lambda n: False)


def test_replicas_must_have_the_same_parameters(world):
    for error in world(2, unequal, errors=True):
        assert isinstance(
            error, ParallelError
        ) and "parameters of ZeRO-1: must be the same on all ranks" in str(error)
