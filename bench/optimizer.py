"""The optimizer's kernels on a Hopper GPU against the bytes that they must move, a copy, and torch's fused AdamW.

    python -m bench.optimizer [--list NAME] [--json FILE]

Lists are parameters of DeepSeek-V3 as one GPU may hold them. For each, in one process and in turns, with a cold L2:

- ours      adamw_ with bf16 moments, fp32 masters and gradients, bf16 parameters out, scale read on the device
- copy      `copy_` of a tensor that moves as many bytes: the ceiling that memory allows on this machine
- fused     torch.optim.AdamW(fused=True) on fp32 parameters and moments, which moves 28 bytes an element and writes no
            bf16 parameters
- with FP8 copies of the weights and their transposes: one step, beside the separate passes adamw_, quantize_128x128 and
            transpose_128x128, and a copy; no bf16 parameters, since FP8 modules keep none
- clip_grad_norm beside torch.nn.utils.get_total_norm and a copy

Results are compared with the reference before anything is timed. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_ops
from bench.proof.measure import compare
from deepseek_ops._registry import absent_reason
from deepseek_ops.optimizer import adamw_, clip_grad_norm
from deepseek_ops.quantize import quantize_128x128, transpose_128x128

# One MoE layer's tensors (report 4.2): MLA projections, norms, router, shared expert, and 4 routed experts of the GPU.
_ATTENTION = [
    (1536, 7168),
    (24576, 1536),
    (576, 7168),
    (32768, 512),
    (7168, 16384),
    (7168,),
    (1536,),
    (512,),
    (7168,),
]
_EXPERT = [(4096, 7168), (7168, 2048)]
LISTS: dict[str, list[tuple[int, ...]]] = {
    "layer": [*_ATTENTION, (256, 7168), *_EXPERT * 5],
    "small": [(7168,)] * 240,  # norms of 60 layers: launches of 58 tensors, bound by latency
    "shard": [(400_000_003,)],  # a ZeRO-1 shard, flat, of odd length
}
STEP_BYTES = 22  # an element: p 4 + 4, g 4, m 2 + 2, v 2 + 2, out 2 (research/gemm-quant.md section 7.2)
FP8_STEP_BYTES = 22  # an element: the same without out, q 1, q_t 1; separate passes move 20 + 5 + 2


def elements(name: str) -> int:
    """Of all tensors of a list."""
    return sum(math.prod(shape) for shape in LISTS[name])


def make_state(shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """params, grads, exp_avg, exp_avg_sq, out as after some steps."""
    params = [torch.randn(shape, device="cuda") for shape in shapes]
    grads = [torch.randn(shape, device="cuda") for shape in shapes]
    exp_avg = [torch.randn(shape, device="cuda").mul_(1e-2).bfloat16() for shape in shapes]
    exp_avg_sq = [torch.rand(shape, device="cuda").mul_(1e-2).bfloat16() for shape in shapes]
    return [params, grads, exp_avg, exp_avg_sq, [p.bfloat16() for p in params]]


def one_step(state: list[list[Tensor]], scale: float | Tensor) -> None:
    """The step that is timed."""
    adamw_(*state[:4], lr=2.2e-4, step=1000, grad_scale=scale, out=state[4])


def copy_of(size: int) -> Callable[[], Tensor]:
    """A copy that reads and writes `size` bytes in all."""
    source = torch.randint(0, 255, (max(size // 2, 1),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def on_cuda(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call on our kernels."""

    def run() -> Any:
        with deepseek_ops.backend("cuda"):
            return call()

    return run


def with_rates(timed: dict[str, Any], size: int) -> dict[str, Any]:
    """GB/s of the bytes that ours must move, for each candidate."""
    for result in timed.values():
        if "median_us" in result:
            result["gbps"] = round(1e-3 * size / result["median_us"], 1)
    return timed


def correct_step() -> bool:
    """Every bit of one step on a small list, tails and all."""
    mine = make_state([(3, 5), (2049,), (70_001,)])
    theirs = [[t.cpu() for t in ts] for ts in mine]
    on_cuda(lambda: one_step(mine, 0.5))()
    with deepseek_ops.backend("reference"):
        one_step(theirs, 0.5)
    return all(
        torch.equal(a.cpu(), b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def step_row(name: str) -> dict[str, Any]:
    """adamw_ on one list."""
    correct = correct_step()
    state, scale = make_state(LISTS[name]), torch.tensor(0.5, device="cuda")
    fused = [torch.nn.Parameter(p.clone()) for p in state[0]]
    for parameter, grad in zip(fused, state[1], strict=True):
        parameter.grad = grad
    theirs = torch.optim.AdamW(fused, lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    size = STEP_BYTES * elements(name)
    timed = compare(
        {"ours": on_cuda(lambda: one_step(state, scale)), "copy": copy_of(size), "fused": theirs.step}
    )
    timed["ours"]["correct"] = correct
    return {"kernel": "adamw_", "shape": name, "input_bytes": size, "candidates": with_rates(timed, size)}


def make_copies(params: list[Tensor]) -> list[Any]:
    """q, scale, q_t, scale_t of each weight in memory that a step may write; None for vectors."""
    made = [quantize_128x128(p) if p.ndim == 2 else None for p in params]
    return [pair and (*pair, *transpose_128x128(*pair)) for pair in made]


def fp8_step(state: list[list[Tensor]], copies: list[Any], scale: float | Tensor) -> None:
    """The step with copies that is timed."""
    adamw_(*state[:4], lr=2.2e-4, step=1000, grad_scale=scale, fp8_out=copies)


def separate_passes(state: list[list[Tensor]], scale: float | Tensor) -> None:
    """What it replaces."""
    adamw_(*state[:4], lr=2.2e-4, step=1000, grad_scale=scale)
    make_copies(state[0])


def correct_copies() -> bool:
    """Every bit of a step with copies on ragged weights."""
    mine = make_state([(3, 5), (2049,), (300, 272), (576, 144)])
    theirs = [[t.cpu() for t in ts] for ts in mine]
    copies = on_cuda(lambda: make_copies(mine[0]))()
    on_cuda(lambda: fp8_step(mine, copies, 0.5))()
    with deepseek_ops.backend("reference"):
        separate_passes(theirs, 0.5)
        want = make_copies(theirs[0])
    same = [
        torch.equal(a.cpu(), b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)
    ]
    for x, y in zip(copies, want, strict=True):
        same += [
            torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(x or (), y or (), strict=True)
        ]
    return all(same)


def copies_row(name: str) -> dict[str, Any]:
    """adamw_ with FP8 copies on one list."""
    correct = correct_copies()
    shapes, scale = LISTS[name], torch.tensor(0.5, device="cuda")
    state = make_state(shapes)
    copies = on_cuda(lambda: make_copies(state[0]))()
    weights = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    size = FP8_STEP_BYTES * weights + 20 * (elements(name) - weights)
    timed = compare(
        {
            "ours": on_cuda(lambda: fp8_step(state, copies, scale)),
            "copy": copy_of(size),
            "separate": on_cuda(lambda: separate_passes(state, scale)),
        }
    )
    timed["ours"]["correct"] = correct
    return {
        "kernel": "adamw_quantize_",
        "shape": name,
        "input_bytes": size,
        "candidates": with_rates(timed, size),
    }


def rows_of(name: str) -> list[Callable[[str], dict[str, Any]]]:
    """What is measured on a list."""
    weights = any(len(shape) == 2 for shape in LISTS[name])
    return [step_row, copies_row, clip_row] if weights else [step_row, clip_row]


def clip_row(name: str) -> dict[str, Any]:
    """clip_grad_norm on one list."""
    grads = [torch.randn(shape, device="cuda") for shape in LISTS[name]]
    norm, _ = on_cuda(lambda: clip_grad_norm(grads, 1.0))()
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    size = 4 * elements(name)
    timed = compare(
        {
            "ours": on_cuda(lambda: clip_grad_norm(grads, 1.0)),
            "copy": copy_of(size),
            "torch": lambda: torch.nn.utils.get_total_norm(grads),
        }
    )
    timed["ours"]["correct"] = abs(float(norm) - exact) <= 1.2e-7 * exact
    return {
        "kernel": "clip_grad_norm",
        "shape": name,
        "input_bytes": size,
        "candidates": with_rates(timed, size),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    ours = row["candidates"]["ours"]
    if "median_us" not in ours:
        return f"{row['kernel']:<16} {row['shape']:<6} absent: {ours.get('absent')}"
    text = f"{row['kernel']:<16} {row['shape']:<6} {ours['median_us']:9.1f} us {ours['gbps']:7.0f} GB/s"
    for name, other in row["candidates"].items():
        if name != "ours" and "median_us" in other:
            text += f"  {name} {other['median_us']:9.1f} us ({other['median_us'] / ours['median_us']:.2f}x)"
    return text + ("" if ours["correct"] else "  WRONG RESULT")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--list", choices=sorted(LISTS), action="append", help="only this list (repeatable)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    for name in options.list or LISTS:
        size = elements(name)
        print(
            f"{name}: {len(LISTS[name])} tensors, {size:,} elements; floor {STEP_BYTES * size / 4.8e6:.0f} us at 4.8 TB/s"
        )
    reason = absent_reason("cuda")
    if reason:
        print(f"no GPU: bench.optimizer measures CUDA kernels, and backend 'cuda' is absent here: {reason}")
        return
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; medians, cold L2")
    rows = []
    for name in options.list or LISTS:
        for row in rows_of(name):
            rows.append(row(name))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if options.json is not None:
        record = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
