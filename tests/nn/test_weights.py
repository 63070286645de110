"""FP8 copies of weights: made once per optimizer step, whoever asks, and never stale in silence."""

import copy
import io

import pytest
import torch

from deepseek_ops.nn import (
    Fp8Experts,
    Fp8Linear,
    Fp8MLP,
    Fp8WeightCache,
    StaleWeightError,
    caches_of,
    refresh_weights,
    stepping,
    verify_weights,
)
from deepseek_ops.nn import weights as weights_module
from deepseek_ops.optimizer import adamw_


def step(module, lr=0.1):
    weights = [p.detach() for p in module.parameters()]
    moments = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    adamw_(weights, [p.grad for p in module.parameters()], *moments, lr=lr, step=1)
    module.zero_grad(set_to_none=True)


def snapshot(module):
    return [t.float().clone() for t in module.fp8_weight()]


def refreshes(module):
    return sum(c.refreshes for part in module.modules() for c in getattr(part, "weight_caches", {}).values())


def assert_fresh(linear):
    other = Fp8Linear(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    for got, want in zip(linear.fp8_weight(), other.fp8_weight(), strict=True):
        assert torch.equal(got.float(), want.float())


def test_copies_are_the_quantised_weight_and_its_exact_transpose():
    linear = Fp8Linear(200, 136)
    weight = linear.fp8_weight()
    assert weight.q.shape == (136, 200) and weight.scale.shape == (2, 2)
    assert torch.equal(weight.q_t.float(), weight.q.float().T)
    assert torch.equal(weight.scale_t, weight.scale.T)


@pytest.mark.parametrize("optimizer", ["adamw_", "torch"])
def test_once_per_step_under_gradient_accumulation(optimizer):
    linear = Fp8Linear(128, 128)
    adam = torch.optim.AdamW(linear.parameters(), lr=0.1)
    before = None
    for number in range(1, 4):
        for _ in range(3):
            linear(torch.randn(4, 128)).sum().backward()
            with torch.no_grad():  # evaluation in between
                linear(torch.randn(4, 128))
            with torch.inference_mode():
                linear(torch.randn(4, 128))
        assert refreshes(linear) == number
        now = snapshot(linear)
        assert before is None or not torch.equal(now[0], before[0])
        before = now
        assert_fresh(linear)
        if optimizer == "torch":
            adam.step()
            adam.zero_grad()
        else:
            step(linear)


def test_every_module_and_refresh_weights():
    model = torch.nn.Sequential(Fp8Linear(16, 16), Fp8MLP(16, 8), Fp8Experts(2, 16, 8))
    assert refresh_weights(model) == 5 and refresh_weights(model) == 0
    with torch.no_grad():
        model[1].down.weight.add_(1)
        model[2].gate_up.mul_(2)
    assert refresh_weights(model) == 2
    assert refresh_weights(model, force=True) == 5
    model[1](model[0](torch.randn(3, 16)))
    assert refreshes(model) == 12


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "replace", "data", "cast"])
def test_other_ways_to_change_a_weight(how):
    linear, source = Fp8Linear(128, 64), Fp8Linear(128, 64)
    linear(torch.randn(2, 128))
    if how == "load_state_dict":
        linear.load_state_dict(source.state_dict())
    elif how == "assign":
        linear.load_state_dict(source.state_dict(), assign=True)
    elif how == "replace":
        linear.weight = torch.nn.Parameter(source.weight.detach().clone())
    elif how == "data":  # another storage under the same version
        linear.weight.data = source.weight.detach().clone()
    else:
        linear.bfloat16().float()
        source.bfloat16().float()
        source.load_state_dict(linear.state_dict())
    x = torch.randn(5, 128)
    assert torch.equal(linear(x), source(x)) and refreshes(linear) == 2
    assert_fresh(linear)


def test_a_storage_that_takes_the_address_of_a_freed_one_is_another():
    """`weight.data = ...` twice: the second may get the memory, and the version, that the first had."""
    linear = Fp8Linear(128, 64)
    linear.weight.data = torch.randn(64, 128)
    x = torch.randn(5, 128)
    linear(x)
    for _ in range(20):
        linear.weight.data = torch.zeros(64, 128)  # frees what was quantised
        linear.weight.data = torch.randn(64, 128)
        linear(x)
        assert_fresh(linear)


def test_copies_and_pickles_of_a_module_start_without_copies_of_weights():
    linear = Fp8Linear(128, 64)
    x = torch.randn(5, 128)
    y = linear(x)
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin.weight.mul_(3)
    assert torch.equal(linear(x), y) and not torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    known = [Fp8Linear, Fp8WeightCache, torch.nn.ModuleDict, set]  # nothing else may be made of a file
    with torch.serialization.safe_globals(known):
        assert torch.equal(torch.load(file, weights_only=True)(x), y)
    assert refreshes(linear) == 1 and set(linear.state_dict()) == {"weight"}


def test_evaluation_makes_no_transposed_copy():
    linear = Fp8Linear(128, 64)
    with torch.no_grad():
        linear(torch.randn(2, 128))
    cache = linear.weight_caches["weight"]
    assert cache._dgrad is None
    linear(torch.randn(2, 128, requires_grad=True)).sum().backward()
    assert cache._dgrad is not None and cache.refreshes == 1


def test_evaluation_in_inference_mode_before_training():
    """The copies are ordinary tensors whoever asked first: inference tensors could be neither saved nor refreshed."""
    linear = Fp8Linear(128, 64)
    x = torch.randn(2, 128, requires_grad=True)
    with torch.inference_mode():
        linear(x)
        assert not linear.fp8_weight().q_t.is_inference()
    linear(x).sum().backward()
    step(linear)
    linear(x).sum().backward()
    assert linear.weight.grad is not None and refreshes(linear) == 2
    assert_fresh(linear)


def test_copies_never_move():
    """A CUDA graph holds their addresses."""
    linear = Fp8Linear(128, 64)
    before = [t.data_ptr() for t in linear.fp8_weight()]
    with torch.no_grad():
        linear.weight.mul_(2)
    assert [t.data_ptr() for t in linear.fp8_weight()] == before and refreshes(linear) == 2


@pytest.mark.parametrize("kind", ["linear", "mlp", "experts"])
def test_backward_over_refreshed_copies_is_an_error(kind):
    """Two steps of a pipeline that mixes up its micro-batches: silence would mean a gradient of neither weight."""
    x = torch.randn(4, 128, requires_grad=True)
    if kind == "experts":
        module = Fp8Experts(2, 128, 64)
        y = module.routed(x, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64))
    else:
        module = Fp8Linear(128, 64) if kind == "linear" else Fp8MLP(128, 64)
        y = module(x)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(2)
    refresh_weights(module)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_master_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        linear = Fp8Linear(128, 64)
        with pytest.raises(StaleWeightError, match=r"weight: was made in inference mode.*build and load"):
            linear(torch.randn(2, 128))


def test_writes_that_nobody_can_see_are_found_by_verify_weights():
    linear = Fp8Linear(128, 64)
    x = torch.randn(2, 128)
    linear(x)
    with verify_weights():
        linear(x)
        linear.weight.data.mul_(2)  # bumps nothing
        with pytest.raises(
            StaleWeightError, match=r"weight: its values changed, its version counter did not"
        ):
            linear(x)
        assert refresh_weights(linear, force=True) == 1
        linear(x)
        assert_fresh(linear)
    flat = torch.randn(64 * 128)  # a parameter that points into a flat buffer of the optimizer
    linear.weight = torch.nn.Parameter(flat.view(64, 128))
    linear(x)
    flat.view(64, 128).mul_(2)
    with verify_weights():
        linear(x)  # a view of `flat` shares its version: seen
    other = torch.randn(64 * 128)
    linear.weight.data = other.view(64, 128)
    linear(x)
    other.mul_(2)  # does not
    with verify_weights(), pytest.raises(StaleWeightError, match="memory that the parameter points into"):
        linear(x)


def test_capturing_a_graph_with_a_changed_weight_is_refused(monkeypatch):
    """Without a GPU: the rule itself, on a master that says it is on one."""

    class OnDevice:
        is_cuda, _version = True, 0

        def __init__(self, weight):
            self.weight = weight

        def __getattr__(self, name):
            return getattr(self.weight, name)

    cache, master = Fp8WeightCache(), OnDevice(torch.randn(16, 16))
    monkeypatch.setattr(weights_module.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(StaleWeightError, match=r"a CUDA graph would not notice.*refresh_weights"):
        cache(master)
    monkeypatch.setattr(weights_module.torch.cuda, "is_current_stream_capturing", lambda: False)
    cache(master)
    monkeypatch.setattr(weights_module.torch.cuda, "is_current_stream_capturing", lambda: True)
    cache(master)  # fresh: the graph holds addresses that never move
    master._version = 1
    with pytest.raises(StaleWeightError, match="CUDA graph"):
        cache(master)


# --- copies that the optimizer's step makes ---------------------------------------------------------------------------


class Stepped:
    """A module and an optimizer whose step makes the FP8 copies."""

    def __init__(self, module):
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.moments = [[torch.zeros_like(p) for p in module.parameters()] for _ in range(2)]

    def step(self, scale=1.0, lr=0.1):
        masters = [p.detach() for p in self.module.parameters()]
        caches = caches_of(self.module)
        with stepping(masters, [caches.get(name) for name in self.names]) as copies:
            grads = [p.grad for p in self.module.parameters()]
            adamw_(masters, grads, *self.moments, lr=lr, step=1, grad_scale=scale, fp8_out=copies)
        self.module.zero_grad(set_to_none=True)
        return copies


def test_the_step_makes_the_copies_that_exist(monkeypatch):
    linear = Fp8Linear(200, 136)
    stepped = Stepped(linear)
    linear.weight.grad = torch.randn(136, 200)
    assert stepped.step() == [None] and refreshes(linear) == 0  # nobody has used it yet
    before = snapshot(linear)
    linear(torch.randn(4, 200)).sum().backward()
    memory = [t.data_ptr() for t in linear.fp8_weight()]
    stepped.step()
    assert refreshes(linear) == 2

    def never(*args):
        raise AssertionError("quantised again")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "quantize_128x128", never)
        patch.setattr(weights_module, "transpose_128x128", never)
        assert not torch.equal(snapshot(linear)[0], before[0])
        assert [t.data_ptr() for t in linear.fp8_weight()] == memory
    assert_fresh(linear)
    with verify_weights():
        linear(torch.randn(4, 200))


def test_without_the_transpose_it_is_made_when_asked_for():
    linear = Fp8Linear(64, 32)
    linear.weight_caches["weight"](linear.weight, transposed=False)
    linear.weight.grad = torch.randn(32, 64)
    (copies,) = Stepped(linear).step()
    assert copies.q_t is None
    assert_fresh(linear)


def test_a_skipped_step_leaves_fresh_copies():
    """Even where the master had changed since its copies were made: by an average swapped in and out, for one."""
    linear = Fp8Linear(64, 32)
    linear(torch.randn(2, 64)).sum().backward()
    with torch.no_grad():
        linear.weight.mul_(3)
    Stepped(linear).step(scale=torch.tensor(float("nan")))
    with verify_weights():
        linear(torch.randn(2, 64))
    assert_fresh(linear)


@pytest.mark.parametrize("how", ["write", "replace", "fail"])
def test_what_happens_after_or_in_the_step_is_seen(how):
    linear = Fp8Linear(64, 32)
    linear(torch.randn(2, 64)).sum().backward()
    stepped = Stepped(linear)
    if how == "fail":
        with pytest.raises(ValueError):
            stepped.step(lr=-1.0)
    else:
        stepped.step()
    with torch.no_grad():
        if how == "write":
            linear.weight.add_(1)
        elif how == "replace":
            linear.weight = torch.nn.Parameter(torch.randn(32, 64))
    assert_fresh(linear)


def test_stacks_and_shared_masters():
    """Experts' weights are stacks; of two modules with one master, one has its copies made by the step."""
    experts, one, two = Fp8Experts(2, 32, 16), Fp8Linear(48, 16), Fp8Linear(48, 16)
    two.weight = one.weight
    model = torch.nn.ModuleList([experts, one, two])
    refresh_weights(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    stepped = Stepped(model)
    assert stepped.names == ["0.gate_up", "0.down", "1.weight"]
    stepped.step()
    assert refresh_weights(model) == 1
    with verify_weights():
        assert refresh_weights(model) == 0
