"""One model on many ranks: what changes when a run is data and expert parallel (report 3.2; docs/parallel.md).

    with launch(Layout(world, ep=...), config=...) as mesh:
        model = Transformer(config); model.reset_parameters()      # the same seed, so the same weights, everywhere
        share_out_experts(model, mesh)
        optimizer = zero_optimizer(model, mesh, settings, moments)
        ...each rank takes its rows of the batch; the loss is divided by the labels of the whole batch...
        sum_counts(model, mesh); model.update_bias(gamma)

The model's code does not know: a MoE layer with a `transport` calls it instead of permuting its tokens itself.
"""

from __future__ import annotations

import torch
from torch import nn

from deepseek_ops.nn import Fp8Experts
from deepseek_ops.parallel.expert import Bounded, ExpertParallel
from deepseek_ops.parallel.mesh import Mesh
from deepseek_ops.parallel.zero import ZeroAdamW
from examples.configs.schedules import AdamWSettings
from examples.errors import UserError
from examples.model.moe import MoE
from examples.model.transformer import Transformer


def share_out_experts(
    model: Transformer, mesh: Mesh, *, capacity: Bounded | None = None, order: str = "tree"
) -> None:
    """Leave this rank its experts of each layer, and give the layer a transport to the others. Collective over `mesh.ep`."""
    for layer in moe_layers(model):
        if layer.transport is not None:
            raise UserError("share_out_experts: the experts of this model are shared out already")
        fp8 = isinstance(layer.experts, Fp8Experts)
        layer.transport = ExpertParallel(mesh, layer.num_experts, capacity=capacity, order=order, fp8=fp8)
        local = layer.transport.local_experts
        for name, weight in list(layer.experts.named_parameters()):
            part = weight.detach()[local.start : local.stop].clone()
            setattr(layer.experts, name, nn.Parameter(part, requires_grad=weight.requires_grad))
        if fp8:
            layer.experts.num_experts = len(local)


def is_expert(name: str) -> bool:
    """Whether a parameter of the model is of routed experts, which EP shares out."""
    return ".experts." in name


def zero_optimizer(
    model: Transformer, mesh: Mesh, settings: AdamWSettings, moments: torch.dtype
) -> ZeroAdamW:
    """AdamW with its state shared out; what `MixedAdamW` is for one process."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return ZeroAdamW(
        params,
        mesh,
        is_expert=is_expert,
        moments=moments,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay={name: settings.weight_decay if p.ndim > 1 else 0.0 for name, p in params.items()},
    )


def sum_counts(model: Transformer, mesh: Mesh) -> None:
    """Tokens per expert of the whole batch on every rank, as `update_bias` wants them: one exact sum for all layers."""
    routers = list(model.routers())
    if not routers:
        return
    counts = mesh.dense.all_reduce_(torch.stack([router.counts for router in routers]), phase="expert counts")
    for router, total in zip(routers, counts, strict=True):
        router.counts.copy_(total)


def moe_layers(model: Transformer) -> list[MoE]:
    """The layers with experts, MTP's too."""
    return [module for module in model.modules() if isinstance(module, MoE)]
