"""Recomputation keeps less and changes nothing."""

import weakref

import pytest
import torch

from examples.model import block, layers, mla, mtp
from examples.model.recompute import dropping


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_gradients_are_the_same_bits(ref, q_lora_rank):
    tokens = ref.tokens(2, 33)
    results = []
    for recompute in (False, True):
        model = ref.model(ref.config(recompute=recompute, q_lora_rank=q_lora_rank))
        out = model.loss(tokens, balance_alpha=0.01)
        out.loss.backward()
        results.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_report_recomputes_is_not_alive_after_forward(ref, monkeypatch, recompute):
    """Outputs of RMSNorms, MLA up-projections and SwiGLU: gone with recomputation, kept without."""
    alive = {}

    def spy(place):
        def wrapped(outputs, rerun, *, active):
            alive.setdefault(place, []).extend(weakref.ref(tensor) for tensor in outputs)
            return dropping(outputs, rerun, active=active)

        return wrapped

    for module in (block, layers, mla, mtp):
        monkeypatch.setattr(module, "dropping", spy(module.__name__.rsplit(".", 1)[-1]))
    model = ref.model(ref.config(recompute=recompute))
    out = model.loss(ref.tokens(2, 17), balance_alpha=0.0)
    assert alive.keys() == {"block", "layers", "mla", "mtp"}
    for place, tensors in alive.items():
        kept = [tensor() for tensor in tensors if tensor() is not None]
        assert (not kept) if recompute else len(kept) >= len(tensors) // 2, place
    out.loss.backward()


@pytest.mark.parametrize("active", [False, True])
def test_views_of_a_dropped_tensor_come_back_right(active):
    """A strided view is kept as a note and cut out of the rerun."""
    x = torch.randn(6, 8, requires_grad=True)
    w = torch.randn(3, 5, requires_grad=True)
    reruns = []

    def rerun():
        reruns.append(1)
        return (x.detach().sin(),)

    y = x.sin()
    with dropping((y,), rerun, active=active):
        z = (y[1:5, 2:5] @ w).sum() + (y * y).sum()
    z.backward(retain_graph=True)
    first = x.grad.clone(), w.grad.clone()
    assert len(reruns) == active  # one rerun for all notes
    x.grad = w.grad = None
    z.backward()
    assert len(reruns) == 2 * active
    assert torch.equal(x.grad, first[0]) and torch.equal(w.grad, first[1])
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    y2 = x2.sin()
    ((y2[1:5, 2:5] @ w2).sum() + (y2 * y2).sum()).backward()
    assert torch.equal(x.grad, x2.grad) and torch.equal(w.grad, w2.grad)


def test_without_gradients_nothing_is_hooked():
    with torch.no_grad(), dropping((torch.ones(2),), lambda: (torch.ones(2),), active=True) as context:
        assert context is None
