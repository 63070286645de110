"""The small parts: Linear, RMSNorm, SwiGLU, the experts' weights, and the two factories that choose a precision.

Report section 3.3.1: every Linear computes in FP8 except the embedding, the output head, the gate, the norms and
attention itself. `make_linear`, `make_ffn` and `make_experts` are the only places that know.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_ops.activation import swiglu
from deepseek_ops.gemm import gemm_grouped
from deepseek_ops.norm import rms_norm, rms_norm_residual
from examples.model.config import ModelConfig, Precision
from examples.model.recompute import dropping

# "linear": FP8 when the model is; "after_attention": also FP8, its input cached in E5M6; "high": never FP8.
Role = Literal["linear", "after_attention", "high"]


def activation_dtype(precision: Precision) -> torch.dtype:
    """The type of activations, and of parameters that are not FP8 masters."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


class Linear(nn.Module):
    """y = x W^T without bias, in the type of the weight [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, role: Role, precision: Precision) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.role, self.precision = role, precision
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=activation_dtype(precision)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Sizes, role and precision."""
        return f"{self.in_features}, {self.out_features}, role={self.role}, precision={self.precision}"


class Experts(nn.Module):
    """The routed experts' weights: gate_up [E, 2I, D] (gate rows first), down [E, D, I]; rows come sorted by expert."""

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, precision: Precision, *, recompute: bool
    ) -> None:
        super().__init__()
        self.precision, self.recompute = precision, recompute
        dtype = activation_dtype(precision)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size, dtype=dtype))

    def forward(self, x: torch.Tensor, row_weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [R, D] sorted by expert, row_weight fp32 [R], offsets int32 [E+1] -> [R, D], weighted, not yet summed."""
        gate_up = gemm_grouped(x, self.gate_up, offsets)
        inner = swiglu(gate_up, row_weight)
        with dropping((inner,), lambda: (swiglu(gate_up, row_weight),), active=self.recompute):
            return gemm_grouped(inner, self.down, offsets)


def make_linear(in_features: int, out_features: int, role: Role, precision: Precision) -> nn.Module:
    """The Linear for a role at a precision."""
    if precision != "fp8" or role == "high":
        return Linear(in_features, out_features, role, precision)
    from deepseek_ops.nn import Fp8Linear

    linear = Fp8Linear(in_features, out_features, cache="e5m6" if role == "after_attention" else "fp8")
    linear.role, linear.precision = role, precision
    return linear


def make_ffn(config: ModelConfig, inner_size: int) -> nn.Module:
    """The dense FFN and the shared experts (several are one wide one): `gate_up` and `down`, at the model's precision."""
    if config.precision != "fp8":
        return SwiGLU(config, inner_size)
    from deepseek_ops.nn import Fp8MLP

    ffn = Fp8MLP(config.hidden_size, inner_size)
    for linear in (ffn.gate_up, ffn.down):
        linear.role, linear.precision = "linear", config.precision
    return ffn


def make_experts(config: ModelConfig, precision: Precision) -> nn.Module:
    """The routed experts at a precision; both kinds share parameters' names, shapes and the call."""
    sizes = (config.num_experts, config.hidden_size, config.expert_inner_size)
    if precision != "fp8":
        return Experts(*sizes, precision, recompute=config.recompute)
    from deepseek_ops.nn import Fp8Experts

    return Fp8Experts(*sizes)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, fp32 inside."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, delta: torch.Tensor | None, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(delta + residual), delta + residual): the residual stream is read and written once."""
        if delta is None:
            return rms_norm(residual, self.weight, self.eps), residual
        return rms_norm_residual(delta, residual, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) where the model is not FP8; see `make_ffn`."""

    def __init__(self, config: ModelConfig, inner_size: int) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.gate_up = make_linear(config.hidden_size, 2 * inner_size, "linear", config.precision)
        self.down = make_linear(inner_size, config.hidden_size, "linear", config.precision)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        gate_up = self.gate_up(x_TD)
        inner = swiglu(gate_up)
        with dropping((inner,), lambda: (swiglu(gate_up),), active=self.recompute):
            return self.down(inner)
