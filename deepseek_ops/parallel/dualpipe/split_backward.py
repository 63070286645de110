"""A backward pass in two halves: gradients of the inputs now, those of the weights whenever there is time for them (Bi and W).

Where a weight meets what comes from the input (the node of a Linear, say) stands a node of autograd's graph that has both below
it. Bi runs the graph for the inputs alone, so such a node computes only what flows on to the input, and leaves the gradient that
reached it here; W starts at these nodes again, with what they left, for the weights alone. Nothing is computed twice by nodes
that look at what is asked of them, which torch's own all do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class Owed:
    """What W has left to do after `backward_input`; `backward_weight` does it, once."""

    def __init__(self) -> None:
        self._starts: list[
            tuple[list[GradientEdge], list[Tensor], list[Tensor]]
        ] = []  # edges, gradients, weights

    def add(self, edges: list[GradientEdge], gradients: list[Tensor], weights: list[Tensor]) -> None:
        """One more place to start from."""
        if edges and weights:
            self._starts.append((edges, gradients, weights))

    def backward_weight(self) -> None:
        """Add the weights' gradients to their `.grad`, and let the graph go."""
        while self._starts:  # no two of them have a node in common, so each may free what it ran through
            edges, gradients, weights = self._starts.pop()
            torch.autograd.backward(edges, gradients, inputs=weights)


def backward_input(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[list[Tensor | None], Owed]:
    """Gradients of `inputs` (leaves without `.grad`; None where none is needed), and what is owed to the weights above them.

    outputs: results of a stage, each with the gradient of the same place; None is a gradient of zero, or an output that needs none.
    A weight that meets the inputs at several nodes is not put off: its gradient is added to `.grad` here.
    """
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    owed = Owed()
    if not pairs:
        return [None] * len(inputs), owed
    roots = [get_gradient_edge(output) for output, _ in pairs]
    if not wanted:  # a first stage: nobody waits for a gradient, so all of it can be put off
        weights = _leaves([edge.node for edge in roots])
        owed.add(roots, [gradient for _, gradient in pairs], weights)
        return [None] * len(inputs), owed

    reaching = _reaching([edge.node for edge in roots], {get_gradient_edge(tensor).node for tensor in wanted})
    meetings: dict[Node, list[Tensor]] = {}
    for node, reaches in reaching.items():
        if reaches:
            apart = [child for child, _ in node.next_functions if child and not reaching[child]]
            meetings[node] = _leaves(apart)
        elif any(node is edge.node for edge in roots):  # an output in which the inputs have no part
            meetings[node] = _leaves([node])
    times = Counter(id(weight) for weights in meetings.values() for weight in weights)
    shared = list({id(w): w for weights in meetings.values() for w in weights if times[id(w)] > 1}.values())

    left: dict[Node, tuple[Any, ...]] = {}
    for edge, (_, gradient) in zip(roots, pairs, strict=True):
        if not reaching[edge.node]:
            owed.add([edge], [gradient], [w for w in meetings[edge.node] if times[id(w)] == 1])
    met = [node for node, weights in meetings.items() if weights and reaching[node]]
    hooks = [node.register_prehook(lambda arrived, node=node: left.update({node: arrived})) for node in met]
    try:
        torch.autograd.backward(
            [output for output, _ in pairs],
            [gradient for _, gradient in pairs],
            inputs=wanted + shared,
            retain_graph=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    for node in met:
        arrived = [(i, g) for i, g in enumerate(left.get(node, ())) if g is not None]
        own = [weight for weight in meetings[node] if times[id(weight)] == 1]
        owed.add([GradientEdge(node, i) for i, _ in arrived], [g for _, g in arrived], own)
    return [tensor.grad for tensor in inputs], owed


def _reaching(roots: Sequence[Node], targets: set[Node]) -> dict[Node, bool]:
    """For every node of the graph below `roots`, whether one of `targets` is below it; without recursion: graphs are deep."""
    reaching: dict[Node, bool] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, children_known = stack.pop()
        if node in reaching:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if children_known:
            reaching[node] = node in targets or any(reaching[child] for child in children)
        else:
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in reaching)
    return reaching


def _leaves(roots: Sequence[Node]) -> list[Tensor]:
    """The leaf tensors below `roots` that collect gradients."""
    seen: set[Node] = set()
    stack, leaves = list(roots), []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return leaves
