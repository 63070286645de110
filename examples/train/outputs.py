"""Outputs of a step of reinforcement learning as packed rows, and what the trainer's model says about their tokens.

Answers of a group are often the same, token for token. What is learnt from equal outputs is equal, so each different one is
computed once and counts as often as it was drawn (`copies`): the gradient of all at the price of those that differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepseek_ops.loss import linear_cross_entropy
from examples.data.chat import ChatSample
from examples.data.chat_pack import fill_rows, pack_rows
from examples.data.pack import Batch
from examples.model.transformer import IGNORED, Transformer
from examples.rollout.group import Rollout
from examples.rollout.replay import FREE, main_routers, replaying


def merge_equal(
    outputs: Sequence[Rollout], which: Sequence[int], advantage: Sequence[float]
) -> tuple[list[int], list[int]]:
    """(indices of the different outputs among `which`, how often each occurs): same prompt, tokens and advantage."""
    first: dict[tuple, int] = {}
    copies: dict[int, int] = {}
    for index in which:
        key = (*outputs[index].prompt, -1, *outputs[index].tokens, advantage[index])
        index = first.setdefault(key, index)
        copies[index] = copies.get(index, 0) + 1
    return list(copies), list(copies.values())


@dataclass
class PackedOutputs:
    """Some rollouts side by side in rows, mutually invisible.

    output: int64 [T], of every output token in the order of `batch`'s labels, which rollout of the step it belongs to.
    sampled: fp32 [T], the sampler's log-probabilities. routes: int16 [layers, B * S, k]. old, reference: fp32 [T] when they are known.
    """

    batch: Batch
    output: torch.Tensor
    sampled: torch.Tensor
    routes: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> PackedOutputs:
        """The same on another device."""
        moved = [t.to(device) for t in (self.output, self.sampled, self.routes)]
        return PackedOutputs(self.batch.to(device), *moved)


def pack_outputs(
    outputs: Sequence[Rollout], which: Sequence[int], row: int, pad: int, micro_batch: int = 0
) -> list[PackedOutputs]:
    """The rollouts `which` in rows of `row` fed tokens, `micro_batch` rows at a time (0: all at once); none of none."""
    if not which:
        return []
    samples = [
        ChatSample(
            [*outputs[i].prompt, *outputs[i].tokens],
            [False] * len(outputs[i].prompt) + [True] * len(outputs[i].tokens),
        )
        for i in which
    ]
    rows = fill_rows([len(sample) for sample in samples], row + 1)
    size = micro_batch or len(rows)
    packs = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        layers, _, k = outputs[which[0]].routes.shape
        routes = torch.full((layers, len(some), row, k), FREE, dtype=torch.int16)
        for r, indices in enumerate(some):
            at = 0
            for index in indices:
                taken = outputs[which[index]].routes
                routes[:, r, at : at + taken.shape[1]] = taken
                at += len(samples[index])
        order = [which[index] for indices in some for index in indices]
        owner = torch.tensor([i for i in order for _ in outputs[i].tokens])
        sampled = torch.cat([outputs[i].logprobs for i in order])
        packs.append(PackedOutputs(pack_rows(samples, some, row, pad), owner, sampled, routes.flatten(1, 2)))
    return packs


def token_logprobs(
    model: Transformer, pack: PackedOutputs, temperature: float, *, replay: bool
) -> torch.Tensor:
    """Log-probability [T] of every output token, differentiable."""
    batch = pack.batch
    with replaying(model, pack.routes if replay and main_routers(model) else None):
        hidden = model(batch.inputs, batch.positions, batch.cu_seqlens).flatten(0, 1)
    mask = batch.loss_mask.flatten()
    hidden = hidden[mask]
    if temperature != 1:
        hidden = hidden / temperature
    labels = batch.labels.flatten()[mask]
    assert not bool((labels == IGNORED).any())
    return -linear_cross_entropy(hidden, model.head.weight, labels, reduction="none")
