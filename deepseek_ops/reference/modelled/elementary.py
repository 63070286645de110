"""Elementary functions and sums in the kernels' own steps (csrc/hopper/math.h, csrc/common/sums.h).

Approximate instructions of the device have an ideal twin on the CPU: each is correctly rounded there. Hardware differs
from it by the last places that docs/numerics.md states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exp(x: Tensor) -> Tensor:
    """e^x of fp32, rounded once."""
    return x.double().exp().float()


def log(x: Tensor) -> Tensor:
    """ln x of fp32, rounded once."""
    return x.double().log().float()


def reciprocal(x: Tensor) -> Tensor:
    """1 / x of fp32, rounded once."""
    return torch.ones_like(x) / x  # 1 / tensor is the same here, but number / tensor is not in general


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x) of fp32, rounded twice."""
    # By way of fp64: torch's fp32 square root on a CPU may be MKL's, which is not always rounded correctly.
    return reciprocal(x.double().sqrt().float())


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) of fp32, each step rounded."""
    return reciprocal(exp(-x) + 1)


def sum_of_groups(x: Tensor) -> Tensor:
    """The fp32 sum of x over its last dimension as fp64: groups of 8 neighbours by a tree in fp32, those in fp64."""
    x = F.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    pairs = x[..., 0::2] + x[..., 1::2]
    fours = pairs[..., 0::2] + pairs[..., 1::2]
    return (fours[..., 0] + fours[..., 1]).double().sum(-1)
