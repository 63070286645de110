"""Group Relative Policy Optimization: the equations (report 5.2.2, 26-28), without a model.

For each question G outputs are sampled from the old policy. An output's advantage is its reward against its group (eq. 28), so
no critic is needed; the probability ratio is clipped as in PPO (eq. 26), and the distance to a reference model is estimated
without bias and never negative (eq. 27, "k3"):

    A_i = (r_i - mean(r)) / std(r)
    J   = mean_i mean_t [ min(ratio A, clip(ratio, 1 - low, 1 + high) A) - beta (pi_ref/pi - log(pi_ref/pi) - 1) ]

The report prints one ratio for a whole output; the paper that it cites for GRPO (DeepSeekMath, eq. 3) has one per token and
their mean over the output, which is what is trained in practice and the default here. Others by name in `NORMALIZATIONS`.

Weights are fixed for the whole batch before any gradient is taken, and a loss is a weighted sum of token terms. So however a
batch is cut into passes, their gradients add up to the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from examples.errors import UserError


@dataclass(frozen=True)
class Normalization:
    """How terms of tokens become one loss.

    by_std: whether an advantage is divided by the group's standard deviation. mean: over what a term is averaged: "output", its
    tokens and then the outputs; "batch", all tokens; "limit", the longest output allowed, then the outputs. whole: one ratio
    for an output, the product over its tokens, instead of one for each token.
    """

    by_std: bool = True
    mean: Literal["output", "batch", "limit"] = "output"
    whole: bool = False


NORMALIZATIONS = {
    "grpo": Normalization(),
    "grpo_printed": Normalization(whole=True),  # eq. 26 and 27 to the letter
    "dapo": Normalization(mean="batch"),  # arXiv 2503.14476: long outputs are not diluted
    "dr_grpo": Normalization(by_std=False, mean="limit"),  # arXiv 2503.20783: neither bias
}


def normalization(name: str) -> Normalization:
    """The entry of `NORMALIZATIONS`."""
    if name not in NORMALIZATIONS:
        raise UserError(f"grpo.normalization: must be one of {', '.join(NORMALIZATIONS)}; got {name!r}")
    return NORMALIZATIONS[name]


def advantages(rewards: torch.Tensor, *, by_std: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 28: rewards [P, G] -> (advantages [P, G], bool [P]: groups without variance).

    std is that of the group itself, with divisor G. A group whose rewards are all equal says nothing about what is better:
    its advantages are exactly 0, not rounding divided by rounding.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise UserError(f"rewards: must be [questions, at least 2 outputs]; got {tuple(rewards.shape)}")
    if not bool(torch.isfinite(rewards).all()):
        raise UserError("rewards: must be finite numbers")
    same = rewards.amax(1) == rewards.amin(1)
    centred = rewards - rewards.mean(1, keepdim=True)
    if by_std:
        centred = centred / rewards.std(1, correction=0, keepdim=True)
    return torch.where(same[:, None], torch.zeros_like(centred), centred), same


def token_weights(lengths: torch.Tensor, kind: Normalization, limit: int) -> torch.Tensor:
    """What a term counts: [N] lengths of all outputs of the step -> [N], the weight of each output's terms.

    A term is of one token, or with `whole` of one output.
    """
    n = len(lengths)
    if kind.whole:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    length = {"output": lengths * n, "batch": lengths.sum().expand(n), "limit": torch.tensor(n * limit)}
    return (1.0 / length[kind.mean].double()).expand(n).clone()


@dataclass
class PolicyLoss:
    """loss: to differentiate. Sums over terms, detached: kl (k3), clipped (terms without a gradient from the ratio), count."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    count: int


def policy_loss(
    logprob: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    output: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    *,
    copies: torch.Tensor | None = None,
    clip_low: float,
    clip_high: float,
    beta: float,
    whole: bool = False,
) -> PolicyLoss:
    """Eq. 26 and 27 as a loss (negated), of some of a step's outputs.

    logprob: [T] log-probabilities of output tokens, with gradient. old, reference: [T], of the policy that sampled and of the
    reference model (None: beta must be 0). output: int64 [T], which output a token belongs to. advantage, weight: [N] of all
    outputs of the step. copies: int64 [N], how many outputs each stands for (None: itself).
    """
    if reference is None and beta:
        raise UserError(f"grpo.beta: must be 0 without a reference model; got {beta}")
    if whole:  # one term for each output that is here
        present, output = output.unique(return_inverse=True)
        zeros = logprob.new_zeros(len(present))
        logprob, old = zeros.index_add(0, output, logprob), zeros.index_add(0, output, old)
        reference = None if reference is None else zeros.index_add(0, output, reference)
        output = present
    times = torch.ones_like(logprob) if copies is None else copies.to(logprob)[output]
    gain, scale = advantage.to(logprob)[output], weight.to(logprob)[output] * times
    ratio = torch.exp(logprob - old)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)
    with torch.no_grad():
        clipped = ((gain > 0) & (ratio > 1 + clip_high)) | ((gain < 0) & (ratio < 1 - clip_low))
    kl = torch.zeros_like(logprob)
    if reference is not None:
        away = reference - logprob
        kl = torch.expm1(away) - away
    loss = -(scale * (surrogate - beta * kl if beta else surrogate)).sum()
    return PolicyLoss(loss, (times * kl.detach()).sum(), (times * clipped).sum(), int(times.sum()))
