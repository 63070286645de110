"""AdamW and the gradient norm on silicon, through the public functions: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from bench.optimizer import copies_of
from bench.proof.rows import same_bits
from deepseek_ops import optimizer, quantize

from . import gpu
from .gpu import draw, need_kernel, repeats, replays

pytestmark = pytest.mark.gpu


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


def stepped(*state: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    """What a step leaves, of copies."""
    copies = [[t.clone() for t in ts] for ts in state]
    one_step(copies, **options)
    return [t for ts in (copies[0], *copies[2:]) for t in ts]


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


WEIGHTS = [
    (512, 768),
    (7,),
    (576, 144),
    (3, 130, 272),
    (129, 20),
    (4099,),
    (1, 1),
]  # whole, ragged, and others


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_with_copies_bits(moments: torch.dtype, pow2: bool) -> None:
    """FP8 copies of weights in a list with other tensors: the bytes of separate passes on the CPU."""
    need_kernel("adamw_quantize_")
    generator = torch.Generator().manual_seed(5)
    made = [[torch.rand(shape, generator=generator) - 0.2 for shape in WEIGHTS] for _ in range(4)]
    second = [[t.abs().to(moments) for t in ts] for ts in made[2:]]
    state = [*made[:2], *second, [p.bfloat16() for p in made[0]]]
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


def step_with_copies(*state: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a step with copies leaves, of copies."""
    params, grads, exp_avg, exp_avg_sq = ([t.clone() for t in ts] for ts in state)
    copies = [four and tuple(torch.zeros_like(t) for t in four) for four in copies_of(params)]
    optimizer.adamw_(params, grads, exp_avg, exp_avg_sq, lr=1e-3, step=3, fp8_out=copies)
    return [*params, *exp_avg, *exp_avg_sq, *(t for four in copies if four for t in four)]


def weights_state(seed: int) -> tuple[list[torch.Tensor], ...]:
    first = [[draw(*shape, seed=seed + i, dtype=torch.float32) for shape in WEIGHTS] for i in range(3)]
    return *first[:2], [m.bfloat16() for m in first[2]], [m.abs().bfloat16() for m in first[1]]


def test_adamw_with_copies_repeat() -> None:
    repeats(step_with_copies, *weights_state(0))


def test_adamw_with_copies_graph() -> None:
    replays(step_with_copies, *(weights_state(seed) for seed in (0, 9)))


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


def test_adamw_repeat() -> None:
    repeats(stepped, *training_state(torch.bfloat16, torch.float32), stochastic_rounding=True)


def test_clip_repeat() -> None:
    repeats(optimizer.clip_grad_norm, training_state(torch.float32, torch.float32)[1], 1.0)


def test_clip_graph() -> None:
    grads = training_state(torch.float32, torch.float32)[1]
    replays(optimizer.clip_grad_norm, (grads, 1.0), ([2 * g for g in grads], 1.0))


def test_adamw_graph() -> None:
    """Clip and step in one graph: a bad gradient skips the step, a good one does not, without asking the host."""
    need_kernel("adamw_")
    state = [[t.cuda() for t in ts] for ts in training_state(torch.bfloat16, torch.float32)]

    def clip_and_step() -> None:
        _, scale = optimizer.clip_grad_norm(state[1], 1.0)
        one_step(state, grad_scale=scale)

    with deepseek_ops.backend("cuda"):
        captured = gpu.Captured(clip_and_step)
        before = [p.clone() for p in state[0]]
        state[1][149][0] = float("inf")
        captured.replay()
        assert all(map(torch.equal, state[0], before))
        state[1][149][0] = 1.0
        captured.replay()
        assert not torch.equal(state[0][149], before[149])
