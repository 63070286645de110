"""Weight gradients are added inside Wgrad, and nobody who looks can tell."""

import pytest
import torch

from deepseek_ops import _registry
from deepseek_ops.nn import Fp8Experts, Fp8Linear, Fp8MLP


@pytest.fixture
def calls(monkeypatch):
    """Names of the Wgrad ops in the order in which they run."""
    names = []
    plain = _registry.Op._call

    def record(self, backend, args, kwargs=_registry.NO_KEYWORDS):
        if self.name.startswith("fp8_wgrad"):
            names.append(self.name)
        return plain(self, backend, args, kwargs)

    monkeypatch.setattr(_registry.Op, "_call", record)
    return names


class Case:
    """A module and what it is called with; each micro-batch has its own numbers."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.module = {
            "linear": lambda: Fp8Linear(128, 64),
            "mlp": lambda: Fp8MLP(128, 64),
            "experts": lambda: Fp8Experts(4, 128, 64),
        }[kind]()
        self.kind = kind

    def loss(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(30, 128, generator=generator, requires_grad=True)
        if self.kind == "experts":
            gate = torch.rand(30, 2, generator=generator)
            idx = torch.rand(30, 3, generator=generator).topk(2, dim=1).indices  # expert 3 gets nothing
            return self.module.routed(x, gate, idx).square().sum()
        return self.module(x).square().sum()

    def gradients(self, seed):
        """Of one micro-batch, by the road on which nothing is added."""
        return torch.autograd.grad(self.loss(seed), list(self.module.parameters()))


@pytest.mark.parametrize("kind", ["linear", "mlp", "experts"])
def test_micro_batches_add_up_in_place_with_autograds_bits(kind, calls):
    case = Case(kind)
    want = [g.clone() for g in case.gradients(0)]
    for seed in (1, 2):
        want = [a + b for a, b in zip(want, case.gradients(seed), strict=True)]
    del calls[:]
    case.loss(0).backward()
    weights = list(case.module.parameters())
    assert all(name in ("fp8_wgrad", "fp8_wgrad_grouped") for name in calls) and len(calls) == len(weights)
    pointers = [w.grad.data_ptr() for w in weights]
    del calls[:]
    case.loss(1).backward()
    case.loss(2).backward()
    assert all(name in ("fp8_wgrad_", "fp8_wgrad_grouped_") for name in calls) and len(calls) == 2 * len(
        weights
    )
    for weight, expected, pointer in zip(weights, want, pointers, strict=True):
        assert weight.grad.dtype == torch.float32 and weight.grad.data_ptr() == pointer
        assert torch.equal(weight.grad, expected)
    case.module.zero_grad(set_to_none=True)
    case.loss(0).backward()
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, case.gradients(0), strict=True))


def test_a_gradient_that_was_zeroed_in_place_is_added_to():
    case = Case("linear")
    case.loss(0).backward()
    case.module.zero_grad(set_to_none=False)
    case.loss(1).backward()
    assert torch.equal(case.module.weight.grad, case.gradients(1)[0])


@pytest.mark.parametrize("hook", ["tensor", "accumulated", "multi"])
def test_hooks_see_every_gradient(hook, calls):
    case = Case("linear")
    weight, seen = case.module.weight, []
    first, second = case.gradients(0)[0], case.gradients(1)[0]
    if hook == "tensor":
        weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    elif hook == "accumulated":
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    else:
        torch.autograd.graph.register_multi_grad_hook([weight], lambda grads: seen.append(grads[0].clone()))
    case.loss(0).backward()
    case.loss(1).backward()
    assert calls.count("fp8_wgrad_") == 0
    if hook == "tensor":
        assert torch.equal(seen[0], first) and torch.equal(weight.grad, 2 * first + 2 * second)
    elif hook == "accumulated":
        assert torch.equal(seen[0], first) and torch.equal(seen[1], first + second)
    else:
        assert torch.equal(seen[0], first) and torch.equal(seen[1], second)


def test_autograd_grad_leaves_the_sum_alone():
    case = Case("linear")
    case.loss(0).backward()
    before = case.module.weight.grad.clone()
    again = case.gradients(0)[0]
    assert torch.equal(again, before) and torch.equal(case.module.weight.grad, before)


def test_backward_with_inputs():
    case = Case("linear")
    case.loss(0).backward()
    before = case.module.weight.grad.clone()
    x = torch.randn(5, 128, requires_grad=True)
    case.module(x).sum().backward(inputs=[x])
    assert torch.equal(case.module.weight.grad, before)
    case.loss(1).backward(inputs=[case.module.weight])
    assert torch.equal(case.module.weight.grad, before + case.gradients(1)[0])


def test_a_weight_used_twice_in_one_graph():
    case = Case("linear")
    want = case.gradients(0)[0] + case.gradients(1)[0]
    (case.loss(0) + case.loss(1)).backward()
    torch.testing.assert_close(case.module.weight.grad, want, rtol=1e-6, atol=1e-6)
    (case.loss(0) + case.loss(1)).backward()  # both are added in place
    torch.testing.assert_close(case.module.weight.grad, 2 * want, rtol=1e-6, atol=1e-6)


def test_another_kind_of_gradient_is_left_to_autograd():
    case = Case("linear")
    case.module.weight.grad = torch.ones(64, 128).to_sparse()
    case.loss(0).backward()
    torch.testing.assert_close(case.module.weight.grad.to_dense(), case.gradients(0)[0] + 1)


def test_a_weight_that_is_computed():
    """Not a leaf: its gradient goes on to what it was computed from."""
    linear = Fp8Linear(128, 64)
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    original = linear.parametrizations.weight.original
    for count in (1, 2):
        linear(torch.ones(3, 128)).sum().backward()
        assert original.grad is not None and original.grad.shape == (64, 128)
        if count == 1:
            first = original.grad.clone()
    torch.testing.assert_close(original.grad, 2 * first)
