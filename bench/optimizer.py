"""The optimizer's kernels on a Hopper GPU against the bytes that they must move, a copy, and torch's fused AdamW.

    python -m bench.optimizer [--quick] [--only WORDS] [--json FILE]

Lists are parameters of DeepSeek-V3 as one GPU may hold them. For each, in one process and in turns, with a cold L2:

- ours      adamw_ with bf16 moments, fp32 masters and gradients, bf16 parameters out, scale read on the device
- copy      `copy_` of a tensor that moves as many bytes: the ceiling that memory allows on this machine
- fused     torch.optim.AdamW(fused=True) on fp32 parameters and moments, which moves 28 bytes an element and writes no
            bf16 parameters
- clip_grad_norm beside torch.nn.utils.get_total_norm and a copy

Results are compared with the reference bit for bit, on a small list. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.proof import memory_bound
from bench.proof.families.optimizer import SHAPES
from bench.proof.memory_bound import Case
from bench.proof.rows import Call, command
from bench.proof.steps import Data
from deepseek_ops import optimizer

Shapes = Sequence[tuple[int, ...]]
STEP_BYTES = 22  # an element: p 4 + 4, g 4, m 2 + 2, v 2 + 2, out 2 (research/gemm-quant.md section 7.2)
SAMPLE: Shapes = [(3, 5), (2049,), (70_001,)]  # tails and all


def elements(shapes: Shapes) -> int:
    """Of all tensors of a list."""
    return sum(math.prod(shape) for shape in shapes)


def state_of(shapes: Shapes, device: str) -> tuple[Any, ...]:
    """params, grads, exp_avg, exp_avg_sq, out as after some steps, and the scale of the gradients."""
    params, grads, first = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(3))
    second = [torch.rand(shape, device=device).mul_(1e-2).bfloat16() for shape in shapes]
    out = [p.bfloat16() for p in params]
    return params, grads, [m.mul_(1e-2).bfloat16() for m in first], second, out, torch.tensor(0.5).to(device)


def one_step(params: list, grads: list, exp_avg: list, exp_avg_sq: list, out: list, scale: Tensor) -> None:
    """The step that is timed."""
    optimizer.adamw_(params, grads, exp_avg, exp_avg_sq, lr=2.2e-4, step=1000, grad_scale=scale, out=out)


def stepped(*state: Any) -> list[Tensor]:
    """What the step leaves, of copies."""
    params, grads, exp_avg, exp_avg_sq, out = ([t.clone() for t in ts] for ts in state[:5])
    one_step(params, grads, exp_avg, exp_avg_sq, out, state[5])
    return [*params, *exp_avg, *exp_avg_sq, *out]


# With FP8 copies of the weight and of its transpose, and no bf16 `out`: p 4 + 4, g 4, m 2 + 2, v 2 + 2, q 1, q_t 1.
COPIES_BYTES = 22
MATRICES: Shapes = [(130, 260), (576, 128)]


def matrices_of(shapes: Shapes) -> Shapes:
    """The weights among the tensors of a list: what FP8 modules multiply."""
    return [shape for shape in shapes if len(shape) == 2]


def copies_of(shapes: Shapes, device: str) -> list[tuple[Tensor, ...]]:
    """Room for q, scale, q_t, scale_t of each weight."""
    room = []
    for n, k in shapes:
        blocks = (-(-n // 128), -(-k // 128))
        room.append(
            (
                torch.empty(n, k, dtype=torch.float8_e4m3fn, device=device),
                torch.empty(blocks, device=device),
                torch.empty(k, n, dtype=torch.float8_e4m3fn, device=device),
                torch.empty(blocks[::-1], device=device),
            )
        )
    return room


def state_with_copies(shapes: Shapes, device: str) -> tuple[Any, ...]:
    """As `state_of`, with FP8 copies in place of bf16 ones."""
    params, grads, exp_avg, exp_avg_sq, _, scale = state_of(shapes, device)
    return params, grads, exp_avg, exp_avg_sq, copies_of(shapes, device), scale


def one_step_with_copies(
    params: list, grads: list, exp_avg: list, exp_avg_sq: list, copies: list, scale: Tensor
) -> None:
    """The step that is timed."""
    optimizer.adamw_(
        params, grads, exp_avg, exp_avg_sq, lr=2.2e-4, step=1000, grad_scale=scale, fp8_out=copies
    )


def stepped_with_copies(*state: Any) -> list[Tensor]:
    """What the step leaves, of copies."""
    params, grads, exp_avg, exp_avg_sq = ([t.clone() for t in ts] for ts in state[:4])
    copies = [tuple(t.clone() for t in room) for room in state[4]]
    one_step_with_copies(params, grads, exp_avg, exp_avg_sq, copies, state[5])
    return [*params, *exp_avg, *exp_avg_sq, *(t for room in copies for t in room)]


def _fused(params: list, grads: list, *_: Any) -> dict[str, Call]:
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    for parameter, grad in zip(theirs, grads, strict=True):
        parameter.grad = grad
    adamw = torch.optim.AdamW(theirs, lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return {"fused": adamw.step}


def gradients_of(shapes: Shapes, device: str) -> tuple[list[Tensor], float]:
    """Arguments of clip_grad_norm."""
    return [torch.randn(shape, device=device) for shape in shapes], 1.0


def _total_norm(grads: list[Tensor], _: float) -> dict[str, Call]:
    return {"torch": lambda: torch.nn.utils.get_total_norm(grads)}


def cases_of(name: str, shapes: Shapes) -> list[Case]:
    """Every kernel on one list."""
    size = elements(shapes)
    return [
        Case(
            "adamw_", name, one_step, partial(state_of, shapes), partial(state_of, SAMPLE),
            pure=stepped, moved=STEP_BYTES * size, baselines=_fused,
        ),
        *_with_copies(name, matrices_of(shapes)),
        Case(
            "clip_grad_norm", name, optimizer.clip_grad_norm, partial(gradients_of, shapes),
            partial(gradients_of, SAMPLE), moved=4 * size, baselines=_total_norm,
        ),
    ]  # fmt: skip


def _with_copies(name: str, weights: Shapes) -> list[Case]:
    if not weights:
        return []
    return [
        Case(
            "adamw_quantize_", name, one_step_with_copies, partial(state_with_copies, weights),
            partial(state_with_copies, MATRICES), pure=stepped_with_copies, moved=COPIES_BYTES * elements(weights),
        )
    ]  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """Every list, or one layer."""
    names = ["layer"] if quick else list(SHAPES)
    return [case for name in names for case in cases_of(name, SHAPES[name])]


def bench(lists: Mapping[str, Shapes]) -> Data:
    """A step of the proof."""
    return memory_bound.bench(case for name, shapes in lists.items() for case in cases_of(name, shapes))


def main(given: list[str] | None = None) -> int:
    """Command line of the module."""
    return command("bench.optimizer", __doc__, cases, memory_bound.measure, memory_bound.floor_us, given)


if __name__ == "__main__":
    raise SystemExit(main())
