"""AdamW as the report trains: FP32 masters and gradients, BF16 moments, BF16 copies in the model (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from deepseek_ops.nn import caches_of, stepping
from deepseek_ops.optimizer import adamw_, clip_grad_norm
from examples.configs.schedules import AdamWSettings

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of `train.moments`


class MixedAdamW:
    """The optimizer state of a model, by parameter name.

    masters: FP32; where a parameter is FP32 already (FP8 Linears, fp32 runs) it is its own master.
    grads: FP32, summed over micro-batches: what is its own master sums in its own `.grad`, where FP8 modules add inside
    the kernel (`deepseek_ops.nn.gradients`); `accumulate` adds the others. exp_avg, exp_avg_sq: `moments`.
    Vectors (the norms' weights) are not decayed; the report does not say which tensors are.

    step_quantizes: the step also refreshes the FP8 copies of weights (`deepseek_ops.nn.weights`), in the kernel that has the
    new master in hand, instead of the next use. The same bits, one pass over the masters less; off, nothing is quantised
    that nobody uses (after the last step, say).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: AdamWSettings,
        moments: torch.dtype,
        *,
        step_quantizes: bool = True,
    ) -> None:
        self.settings = settings
        self._params = dict(model.named_parameters())
        self.masters = {
            name: p.detach() if p.dtype == torch.float32 else p.detach().float()
            for name, p in self._params.items()
        }
        self._copied = [name for name, p in self._params.items() if p.dtype != torch.float32]
        # Copies are of what the modules hold: of a master only where it is the parameter.
        caches = caches_of(model) if step_quantizes else {}
        self._caches = {name: cache for name, cache in caches.items() if name not in self._copied}
        self.grads: dict[str, torch.Tensor] = {}
        self.exp_avg = {n: torch.zeros_like(m, dtype=moments) for n, m in self.masters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(m, dtype=moments) for n, m in self.masters.items()}

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """What a checkpoint must hold beside the model: masters that are not parameters, and the moments."""
        return {
            "masters": {name: self.masters[name] for name in self._copied},
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }

    @torch.no_grad()
    def accumulate(self) -> None:
        """Bring the parameters' gradients into the FP32 sum; call after each backward pass."""
        for name, param in self._params.items():
            if param.grad is None:
                continue
            if param.dtype == torch.float32:
                self.grads[name] = param.grad
                continue
            grad = self.grads.get(name)
            if grad is None:
                self.grads[name] = param.grad.float()
            else:
                grad.add_(param.grad)
            param.grad = None

    def norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Global gradient norm and the factor that clips it, both fp32 scalars on the device."""
        return clip_grad_norm(list(self.grads.values()), self.settings.max_grad_norm)

    @torch.no_grad()
    def step(self, number: int, lr: float, scale: torch.Tensor) -> None:
        """One update (number counts from 1) with gradients times `scale`; parameters without gradient stay."""
        names = list(self.grads)
        masters = [self.masters[name] for name in names]
        with stepping(masters, [self._caches.get(name) for name in names]) as fp8_copies:
            adamw_(
                masters,
                [self.grads[name] for name in names],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                lr=lr,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                eps=self.settings.eps,
                weight_decay=[self.settings.weight_decay if m.ndim > 1 else 0.0 for m in masters],
                step=number,
                grad_scale=scale,
                fp8_out=fp8_copies,
            )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the model's parameters."""
        if self._copied:
            torch._foreach_copy_(
                [self._params[name].detach() for name in self._copied],
                [self.masters[name] for name in self._copied],
            )

    def zero(self) -> None:
        """Forget the gradients."""
        self.grads.clear()
        for param in self._params.values():
            param.grad = None
