"""Bi and W together are a backward pass: same gradients, and neither half computes what is the other's."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_ops.nn.linear import Fp8Linear
from deepseek_ops.parallel.dualpipe.split_backward import backward_input


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Norm weight, bias, residual, a product of two branches, a weight used twice, and one unused."""

    def __init__(self, tied=False):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.tied = tied

    def forward(self, x):
        for _ in range(2 if self.tied else 1):
            h = self.norm(x)
            x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return x


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def both_ways(module, inputs, run=lambda m, *x: m(*x)):
    """(input gradients, weights' gradients) by autograd and by halves, and the weights' between the halves."""
    found = []
    for split in (False, True):
        module.zero_grad()
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        outputs = run(module, *leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [randn(*o.shape, seed=9 + i) if o.requires_grad else None for i, o in enumerate(outputs)]
        if split:
            dx, owed = backward_input(outputs, upstream, leaves)
            between = gradients(module)
            owed.backward_weight()
        else:
            pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
            dx = [leaf.grad for leaf in leaves]
        found.append((dx, gradients(module)))
    return *found, between


def same(one, other):
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_halves_are_the_whole(tied):
    torch.manual_seed(0)
    x = randn(5, 8).requires_grad_()
    (dx, dw), (dx_split, dw_split), between = both_ways(Block(tied), [x])
    same(dx[0], dx_split[0])
    for name in dw:
        same(dw[name], dw_split[name])
    assert dw["unused"] is None
    for name, gradient in between.items():  # put off, but for weights that were used twice
        assert (gradient is not None) == (tied and name != "unused"), name


def test_a_first_stage_puts_everything_off():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.block = nn.Embedding(11, 8), Block()

        def forward(self, tokens):
            return self.block(self.embedding(tokens))

    torch.manual_seed(0)
    (_, dw), (dx, dw_split), between = both_ways(First(), [torch.arange(6) % 4])
    assert dx == [None] and all(gradient is None for gradient in between.values())
    for name in dw:
        same(dw[name], dw_split[name])


def test_several_inputs_and_outputs_some_without_gradient():
    def run(module, x, y, mask):
        h = module(x * mask)
        return h, module.up(y).sum(), (mask > 0).float(), module.unused * 2

    torch.manual_seed(0)
    x, y, mask = randn(5, 8).requires_grad_(), randn(2, 8, seed=1), randn(5, 8, seed=2)
    (dx, dw), (dx_split, dw_split), _ = both_ways(Block(), [x, y, mask], run)
    assert dx_split[1:] == [None, None]
    same(dx[0], dx_split[0])
    for name in dw:
        same(dw[name], dw_split[name])
    assert dw["unused"] is not None


def test_gradients_add_up_over_microbatches():
    torch.manual_seed(0)
    module = Block()
    whole = [randn(5, 8, seed=s) for s in range(3)]
    owed = []
    for x in whole:
        y = module(x.requires_grad_())
        owed.append(backward_input([y], [torch.ones_like(y)], [x])[1])
    for one in owed:
        one.backward_weight()
    split = gradients(module)
    module.zero_grad()
    sum(module(x).sum() for x in whole).backward()
    for name, gradient in gradients(module).items():
        same(gradient, split[name])


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        return result


def test_each_half_computes_its_own_products_only():
    """Three Linears: Bi multiplies three times, for what flows down; W three times, for the weights."""
    torch.manual_seed(0)
    module, x = Block(), randn(5, 8).requires_grad_()
    y = module(x)
    with Products() as inputs:
        _, owed = backward_input([y], [torch.ones_like(y)], [x])
    with Products() as weights:
        owed.backward_weight()
    assert sorted(inputs.shapes) == [(5, 8), (5, 8), (5, 12)]
    assert sorted(map(sorted, weights.shapes)) == [[8, 12]] * 3


def test_layers_with_backward_passes_of_their_own():
    """FP8 Linears add to `.grad` themselves where they may; over halves and micro-batches it is the same sum."""
    torch.manual_seed(0)
    module = nn.Sequential(Fp8Linear(128, 256), nn.SiLU(), Fp8Linear(256, 128))
    batches = [randn(128, 128, seed=s).bfloat16() for s in range(3)]
    found = []
    for split in (False, True):
        module.zero_grad()
        dx = []
        for batch in batches:
            x = batch.clone().requires_grad_()
            y = module(x)
            upstream = torch.ones_like(y)
            if split:
                gradients_of_inputs, owed = backward_input([y], [upstream], [x])
                before = gradients(module)
                owed.backward_weight()
                assert all(
                    a is None or not torch.equal(a, b)
                    for a, b in zip(before.values(), gradients(module).values(), strict=True)
                )
                dx += gradients_of_inputs
            else:
                y.backward(upstream)
                dx.append(x.grad)
        found.append((dx, gradients(module)))
    for one, other in zip(*(dx for dx, _ in found), strict=True):
        assert torch.equal(one, other)
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_hooks_on_weights_see_every_gradient_once():
    """What reduces gradients as they come (data parallelism) hangs on the weights; put off or not, each hook runs once."""
    torch.manual_seed(0)
    for tied in (False, True):
        module, x, seen = Block(tied), randn(5, 8).requires_grad_(), []
        for name, parameter in module.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, seen=seen: seen.append(name))
        y = module(x)
        _, owed = backward_input([y], [torch.ones_like(y)], [x])
        assert bool(seen) == tied
        owed.backward_weight()
        assert sorted(seen) == sorted(name for name, _ in module.named_parameters() if name != "unused")
