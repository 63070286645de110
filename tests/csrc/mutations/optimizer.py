"""Mutation runs of optimizer."""

from __future__ import annotations

import torch

from deepseek_ops.optimizer import adamw_, clip_grad_norm
from tests.csrc.building import ROOT
from tests.csrc.mutation import Kernel, Site, on_checked


def kernels() -> list[Kernel]:
    generator = torch.Generator().manual_seed(0)
    state = [[torch.rand(n, generator=generator) for n in (2100, 30)] for _ in range(4)]

    def step() -> list[torch.Tensor]:
        lists = [[t.clone() for t in ts] for ts in state]
        adamw_(*lists, lr=1e-2, step=2)
        return [t for ts in lists for t in ts]

    weights = [[torch.rand(n, 48, generator=generator) for n in (130, 16)] for _ in range(4)]

    shapes = ((130, 48), (2, 1)), ((48, 130), (1, 2)), ((16, 48), (1, 1)), ((48, 16), (1, 1))
    empty = [(torch.zeros(q, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(s)) for q, s in shapes]

    def step_with_copies() -> list[torch.Tensor]:
        lists = [[t.clone() for t in ts] for ts in weights]
        made = [tuple(t.clone() for t in pair) for pair in empty]
        adamw_(*lists, lr=1e-2, step=2, fp8_out=[made[0] + made[1], made[2] + made[3]])
        return [t for ts in lists for t in ts] + [t.float() for pair in made for t in pair]

    def first_stage() -> list[Site]:
        source = (ROOT / "csrc/optimizer/grad_norm.cuh").read_text().splitlines()
        lines = [i for i, line in enumerate(source, 1) if "= block_sum(" in line]
        return [("barrier_sync", f"grad_norm.cuh:{line}") for line in lines]

    return [
        on_checked("clip_grad_norm", lambda: list(clip_grad_norm(state[0] * 3, 1.0)), first_stage),
        on_checked("adamw_", step),
        on_checked("adamw_quantize_", step_with_copies),
    ]
