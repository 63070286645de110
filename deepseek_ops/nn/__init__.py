"""Modules that people put into a model, built on the ops: figure 6 of the report with autograd (README.md beside this)."""

from .attention import attention_linear
from .experts import Fp8Experts
from .gate import gate_logits
from .linear import Fp8Linear, quantize_input
from .mlp import Fp8MLP
from .weights import (
    Fp8Weight,
    Fp8WeightCache,
    StaleWeightError,
    caches_of,
    refresh_weights,
    stepping,
    verify_weights,
)

__all__ = [
    "Fp8Experts",
    "Fp8Linear",
    "Fp8MLP",
    "Fp8Weight",
    "Fp8WeightCache",
    "StaleWeightError",
    "attention_linear",
    "caches_of",
    "gate_logits",
    "quantize_input",
    "refresh_weights",
    "stepping",
    "verify_weights",
]
