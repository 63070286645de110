"""Modules that people put into a model, built on the ops: FP8 Linear and FP8 experts with autograd."""

from .experts import Fp8Experts
from .linear import Fp8Linear
from .weights import Fp8Weight, Fp8WeightCache

__all__ = ["Fp8Experts", "Fp8Linear", "Fp8Weight", "Fp8WeightCache"]
