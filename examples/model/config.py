"""The shape of a DeepSeek-V3 model: every number of report section 4.2 that is about architecture, none about training.

No torch here: configurations are read, changed and checked before anything heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from examples.errors import UserError
from examples.fields import dataclass_from_dict

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN, applied to the decoupled shared key and its queries when the context is extended (report section 4.3).

    factor: s, new length / trained length. original_max: the trained length. beta_fast, beta_slow: the report's beta
    and alpha, in rotations per trained length. mscale: the attention temperature is (0.1 mscale ln(factor) + 1)^2.
    """

    factor: float = 40.0
    original_max: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "yarn.factor", "must be at least 1", self.factor)
        _require(self.original_max >= 1, "yarn.original_max", "must be at least 1", self.original_max)
        _require(
            self.beta_fast > self.beta_slow, "yarn.beta_fast", "must exceed yarn.beta_slow", self.beta_fast
        )


@dataclass(frozen=True)
class ModelConfig:
    """One model. The defaults are the 671B model of the report; `examples/configs/` has the others.

    vocab_size, hidden_size (d), num_layers, num_dense_layers (the first ones, without experts).
    num_heads, q_lora_rank (d_c'; None: queries are not compressed), kv_lora_rank (d_c), qk_nope_head_dim (d_h),
    qk_rope_head_dim (d_h^R), v_head_dim: section 2.1.1.
    dense_inner_size, expert_inner_size, num_experts, num_shared_experts, top_k, num_groups, top_groups (nodes a token
    may visit), routed_scale (multiplies the normalised gates; from the released weights, not in the report): 2.1.2.
    mtp_depth: D of section 2.2. max_positions: longest sequence. rope_theta, yarn: section 4.3.
    norm_eps, init_std: section 4.2.
    precision: "fp32"; "bf16"; "fp8": the Linears of section 3.3 compute in FP8, the rest in bf16.
    balance_selection: what eq. 18 counts, "biased": the experts that were chosen, as implementations do; "unbiased":
    the top-k of the bare affinities, as printed.
    recompute: run RMSNorm and the MLA up-projections again in backward instead of keeping them (section 3.2.3).
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    num_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    dense_inner_size: int = 18432
    expert_inner_size: int = 2048
    num_experts: int = 256
    num_shared_experts: int = 1
    top_k: int = 8
    num_groups: int = 8
    top_groups: int = 4
    routed_scale: float = 2.5
    mtp_depth: int = 1
    max_positions: int = 4096
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.006
    precision: Precision = "bf16"
    balance_selection: Literal["biased", "unbiased"] = "biased"
    recompute: bool = False

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_layers num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "dense_inner_size expert_inner_size num_experts top_k num_groups top_groups max_positions"
        )
        for name in positive.split():
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("num_dense_layers", "num_shared_experts", "mtp_depth"):
            _require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        if self.q_lora_rank is not None:
            _require(self.q_lora_rank >= 1, "q_lora_rank", "must be at least 1, or none", self.q_lora_rank)
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even", self.qk_rope_head_dim)
        _require(
            self.num_dense_layers <= self.num_layers,
            "num_dense_layers",
            f"must be at most num_layers = {self.num_layers}",
            self.num_dense_layers,
        )
        _require(
            self.num_experts % self.num_groups == 0,
            "num_groups",
            f"must divide num_experts = {self.num_experts}",
            self.num_groups,
        )
        _require(
            self.top_groups <= self.num_groups,
            "top_groups",
            f"must be at most num_groups = {self.num_groups}",
            self.top_groups,
        )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        _require(
            self.top_k <= reachable,
            "top_k",
            f"must be at most the {reachable} experts in top_groups",
            self.top_k,
        )
        _require(
            self.precision in ("fp32", "bf16", "fp8"),
            "precision",
            "must be fp32, bf16 or fp8",
            self.precision,
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values that one token keeps in the cache of one layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, without the MTP modules."""
        return self.num_layers - self.num_dense_layers

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-0.5, times the squared YaRN temperature when YaRN is on."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.factor > 1:
            scale *= (0.1 * self.yarn.mscale * math.log(self.yarn.factor) + 1.0) ** 2
        return scale

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From JSON-like values. Unknown keys and wrong types raise `UserError`, naming the nearest valid key."""
        return dataclass_from_dict(cls, values, "model")


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise UserError(f"model.{name}: {rule}; got {value}")
