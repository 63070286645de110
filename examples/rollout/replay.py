"""Router replay: the trainer computes with the experts that the rollout chose.

Generation and training round differently, and where two experts are nearly tied a rounding decides. Users of other systems
measured that a tenth of all routers disagree between their two engines, so that almost every token meets another expert in
some layer, and the ratio pi / pi_old of an output that nothing has changed is not 1. So choices are recorded while sampling
and made again in the forward passes that learn from the samples. Only the choice is replayed: the gates' values are those of
the trainer's own scores, and the gradient flows through them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from deepseek_ops._checks import ArgumentError
from examples.model.moe import Router
from examples.model.transformer import Transformer

EPSILON = 1e-20  # as `deepseek_ops.moe.route` adds it to the sum of the chosen scores
FREE = -1  # in place of a recorded choice: the router decides


def main_routers(model: Transformer) -> list[Router]:
    """The gates of the main model, layer by layer; MTP takes no part in sampling."""
    return [module for module in model.layers.modules() if isinstance(module, Router)]


@contextlib.contextmanager
def recording(model: Transformer) -> Iterator[list[list[torch.Tensor]]]:
    """While active, gives per router a list that grows by the choices int64 [T, k] of each pass."""
    routers = main_routers(model)
    taken: list[list[torch.Tensor]] = [[] for _ in routers]

    def record(into: list[torch.Tensor], route: Callable, logits: torch.Tensor, *args: Any, **options: Any):
        result = route(logits, *args, **options)
        into.append(result[0])
        return result

    with _intercepted(routers, [partial(record, into) for into in taken]):
        yield taken


@contextlib.contextmanager
def replaying(model: Transformer, routes: torch.Tensor | None) -> Iterator[None]:
    """While active, each pass of the main model takes these experts.

    routes: int [layers with experts, T, k], in the order in which they were recorded (best first), T all tokens that are fed;
    a token whose first entry is `FREE` is routed as usual. None: nothing is replayed.
    """
    routers = main_routers(model) if routes is not None else []
    if routes is not None and len(routes) != len(routers):
        raise ArgumentError(f"routes: must be of {len(routers)} layers; got {len(routes)}")
    with _intercepted(routers, [partial(_replay, layer.long()) for layer in (routes if routers else ())]):
        yield


def _replay(
    routes: torch.Tensor,
    route: Callable,
    logits: torch.Tensor,
    *args: Any,
    top_k: int,
    scale: float,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    if routes.shape != (logits.shape[0], top_k):
        raise ArgumentError(
            f"routes: must be [{logits.shape[0]}, {top_k}] in each layer; got {tuple(routes.shape)}"
        )
    own, _, scores, _ = route(logits, *args, top_k=top_k, scale=scale, **options)
    topk_idx = torch.where(routes[:, :1] == FREE, own, routes)
    chosen = scores.gather(1, topk_idx)
    weight = chosen / (chosen.sum(-1, keepdim=True) + EPSILON) * scale
    return topk_idx, weight, scores, torch.bincount(topk_idx.flatten(), minlength=logits.shape[1])


@contextlib.contextmanager
def _intercepted(routers: list[Router], functions: list[Callable]) -> Iterator[None]:
    for router, function in zip(routers, functions, strict=True):
        router.intercept = function
    try:
        yield
    finally:
        for router in routers:
            router.intercept = None
