"""DeepSeekMoE with auxiliary-loss-free balancing and node-limited routing (report section 2.1.2).

Affinities are sigmoids; a bias per expert takes part in the choice but not in the gate's value (eq. 16). After each step
the bias of an overloaded expert falls by gamma and that of an underloaded one rises: `Router.update_bias`. The bias is
state, not a parameter: it stays in fp32 whatever the model is cast to, and tokens are counted in int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deepseek_ops.moe import permute, route, unpermute, update_bias_
from deepseek_ops.nn import Fp8Experts, gate_logits, quantize_input
from examples.model.config import ModelConfig
from examples.model.layers import activation_dtype, make_experts, make_ffn

if TYPE_CHECKING:
    from deepseek_ops.parallel.expert import ExpertParallel


@dataclass
class Routing:
    """One MoE layer's decisions in one pass, for the balance loss, for logs, and for replay.

    scores: fp32 [T, E], differentiable. topk_idx: int64 [T, k]. counts: int64 [E], tokens per expert.
    """

    scores: torch.Tensor
    topk_idx: torch.Tensor
    counts: torch.Tensor


class Router(nn.Module):
    """The gate: `weight` [E, D]; `bias` fp32 [E] and `counts` int64 [E] are buffers, saved and never in the optimizer.

    `counts` grows in each training-mode forward, exactly once per token, also when a checkpoint runs the forward again
    inside backward; `update_bias` uses it up.

    intercept: called instead of `route`, with it as the first argument: `examples.rollout.replay` records choices with it and
    makes them again.
    """

    intercept: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "top_k": config.top_k,
            "num_groups": config.num_groups,
            "top_groups": config.top_groups,
            "scale": config.routed_scale,
        }
        dtype = activation_dtype(config.precision)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=dtype))
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(config.num_experts, dtype=torch.int64))

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[T, D] -> (gate values fp32 [T, k], the decisions). Logits are an fp32 product of the operands as they are."""
        return self.choose(gate_logits(x_TD, self.weight))

    def choose(
        self, logits: torch.Tensor, route: Callable[..., tuple[torch.Tensor, ...]] = route
    ) -> tuple[torch.Tensor, Routing]:
        """Logits fp32 [T, E] -> as `forward`; counts the tokens when training."""
        if self.intercept is not None:
            route = partial(self.intercept, route)
        topk_idx, topk_weight, scores, counts = route(logits, self.bias, **self.options)
        if self.training and torch._C._current_graph_task_id() == -1:  # -1: not inside a backward pass
            self.counts += counts
        return topk_weight, Routing(scores, topk_idx, counts)

    @torch.no_grad()
    def update_bias(self, speed: float) -> None:
        """One step of the sign rule with the tokens counted since the last call; the count starts again."""
        update_bias_(self.bias, self.counts, speed=speed)
        self.counts.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Casts of the model leave the bias in fp32, value and all: steps of 0.001 vanish in bf16."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self


class MoE(nn.Module):
    """Shared experts for every token plus the top-k of the routed ones.

    transport: where experts are shared out over ranks, who brings tokens to them and back (`examples.train.parallel`).
    """

    transport: ExpertParallel | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.router = Router(config)
        self.experts = make_experts(config, config.precision)
        shared = config.num_shared_experts
        self.shared = make_ffn(config, shared * config.expert_inner_size) if shared else None

    def forward(self, x_TD: torch.Tensor, record: list[Routing] | None = None) -> torch.Tensor:
        """[T, D] -> [T, D]; appends this layer's decisions to `record`."""
        topk_weight, routing = self.router(x_TD)
        if record is not None:
            record.append(routing)
        return self.combine(x_TD, topk_weight, routing.topk_idx)

    def combine(self, x_TD: torch.Tensor, topk_weight: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts, weighted, and the shared ones: [T, D], fp32 [T, k], int64 [T, k] -> [T, D]."""
        if self.transport is not None:
            out = self.transport.routed(self.experts, x_TD, topk_weight, topk_idx)
            return out if self.shared is None else out + self.shared(x_TD)
        if isinstance(self.experts, Fp8Experts):
            quantized = quantize_input(x_TD)  # once, for the routed and the shared experts, in both passes
            out = self.experts.routed(x_TD, topk_weight, topk_idx, quantized)
            return out if self.shared is None else out + self.shared(x_TD, quantized)
        rows, offsets, source = permute(x_TD, topk_idx, self.num_experts)
        # The gate's value multiplies inside SwiGLU, before the down-projection: one pass less over [T * k, D].
        rows = self.experts(rows, topk_weight.flatten().index_select(0, source), offsets)
        out = unpermute(rows, source, x_TD.shape[0], self.top_k)
        return out if self.shared is None else out + self.shared(x_TD)
