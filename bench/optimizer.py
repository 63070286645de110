"""The optimizer's kernels on a Hopper GPU against the bytes that they must move, a copy, and torch's fused AdamW.

    python -m bench.optimizer [--quick] [--only WORDS] [--json FILE]

Lists are parameters of DeepSeek-V3 as one GPU may hold them. For each, in one process and in turns, with a cold L2:

- ours      adamw_ with bf16 moments, fp32 masters and gradients, bf16 parameters out, scale read on the device
- copy      `copy_` of a tensor that moves as many bytes: the ceiling that memory allows on this machine
- fused     torch.optim.AdamW(fused=True) on fp32 parameters and moments, which moves 28 bytes an element and writes no
            bf16 parameters
- adamw_quantize_, the step with FP8 copies of the weights and their transposes, beside a copy and the separate passes
            adamw_, quantize_128x128 and transpose_128x128; no bf16 parameters, since FP8 modules keep none
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
from bench.proof.rows import Call, command, on
from bench.proof.steps import Data
from deepseek_ops import optimizer, quantize

Shapes = Sequence[tuple[int, ...]]
Tensors = list[Tensor]
STEP_BYTES = 22  # an element: p 4 + 4, g 4, m 2 + 2, v 2 + 2, out 2 (research/gemm-quant.md section 7.2)
FP8_STEP_BYTES = 22  # the same without out, q 1, q_t 1; separate passes move 20 + 5 + 2
REST_BYTES = 20  # and of what has no copies
SAMPLE: Shapes = [(3, 5), (2049,), (70_001,)]  # tails and all
SAMPLE_WEIGHTS: Shapes = [(3, 5), (2049,), (300, 272), (576, 144)]


def elements(shapes: Shapes) -> int:
    """Of all tensors of a list."""
    return sum(math.prod(shape) for shape in shapes)


def state_of(shapes: Shapes, device: str) -> tuple[Any, ...]:
    """params, grads, exp_avg, exp_avg_sq, out as after some steps, and the scale of the gradients."""
    params, grads, first = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(3))
    second = [torch.rand(shape, device=device).mul_(1e-2).bfloat16() for shape in shapes]
    out = [p.bfloat16() for p in params]
    return params, grads, [m.mul_(1e-2).bfloat16() for m in first], second, out, torch.tensor(0.5).to(device)


def one_step(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, out: Tensors, scale: Tensor
) -> None:
    """The step that is timed."""
    optimizer.adamw_(params, grads, exp_avg, exp_avg_sq, lr=2.2e-4, step=1000, grad_scale=scale, out=out)


def stepped(*state: Any) -> list[Tensor]:
    """What the step leaves, of copies."""
    params, grads, exp_avg, exp_avg_sq, out = ([t.clone() for t in ts] for ts in state[:5])
    one_step(params, grads, exp_avg, exp_avg_sq, out, state[5])
    return [*params, *exp_avg, *exp_avg_sq, *out]


def _fused(params: Tensors, grads: Tensors, *_: Any) -> dict[str, Call]:
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    for parameter, grad in zip(theirs, grads, strict=True):
        parameter.grad = grad
    adamw = torch.optim.AdamW(theirs, lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return {"fused": adamw.step}


def copies_of(params: Sequence[Tensor]) -> list[Any]:
    """q, scale, q_t, scale_t of each weight in memory that a step may write; None for vectors."""
    made = [quantize.quantize_128x128(p) if p.ndim == 2 else None for p in params]
    return [pair and (*pair, *quantize.transpose_128x128(*pair)) for pair in made]


def fp8_state_of(shapes: Shapes, device: str) -> tuple[Any, ...]:
    """As `state_of`, with FP8 copies instead of out."""
    *state, _, scale = state_of(shapes, device)
    return *state, copies_of(state[0]), scale


def fp8_step(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, copies: list[Any], scale: Tensor
) -> None:
    """The step with copies that is timed."""
    optimizer.adamw_(
        params, grads, exp_avg, exp_avg_sq, lr=2.2e-4, step=1000, grad_scale=scale, fp8_out=copies
    )


def fp8_stepped(*state: Any) -> list[Tensor]:
    """What it leaves, of copies."""
    params, grads, exp_avg, exp_avg_sq = ([t.clone() for t in ts] for ts in state[:4])
    copies = [four and tuple(t.clone() for t in four) for four in state[4]]
    fp8_step(params, grads, exp_avg, exp_avg_sq, copies, state[5])
    return [*params, *exp_avg, *exp_avg_sq, *(t for four in copies if four for t in four)]


def _separate(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, *more: Any
) -> dict[str, Call]:
    def passes() -> None:
        optimizer.adamw_(params, grads, exp_avg, exp_avg_sq, lr=2.2e-4, step=1000, grad_scale=more[1])
        copies_of(params)

    return {"separate": on("cuda", passes)}


def gradients_of(shapes: Shapes, device: str) -> tuple[list[Tensor], float]:
    """Arguments of clip_grad_norm."""
    return [torch.randn(shape, device=device) for shape in shapes], 1.0


def _total_norm(grads: list[Tensor], _: float) -> dict[str, Call]:
    return {"torch": lambda: torch.nn.utils.get_total_norm(grads)}


def cases_of(name: str, shapes: Shapes) -> list[Case]:
    """Every kernel on one list; copies only where there are weights."""
    size, weights = elements(shapes), elements([shape for shape in shapes if len(shape) == 2])
    step = Case(
        "adamw_", name, one_step, partial(state_of, shapes), partial(state_of, SAMPLE),
        pure=stepped, moved=STEP_BYTES * size, baselines=_fused,
    )  # fmt: skip
    with_copies = Case(
        "adamw_quantize_", name, fp8_step, partial(fp8_state_of, shapes), partial(fp8_state_of, SAMPLE_WEIGHTS),
        pure=fp8_stepped, moved=FP8_STEP_BYTES * weights + REST_BYTES * (size - weights), baselines=_separate,
    )  # fmt: skip
    clip = Case(
        "clip_grad_norm", name, optimizer.clip_grad_norm, partial(gradients_of, shapes),
        partial(gradients_of, SAMPLE), moved=4 * size, baselines=_total_norm,
    )  # fmt: skip
    return [step, with_copies, clip] if weights else [step, clip]


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
