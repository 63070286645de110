"""CpuEma: the average does not depend on timing, never races with the optimizer, and resumes exactly."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops.optimizer import CpuEma


def named(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (40, 501), "a.norm": (7,), "scalar": (), "none": (0, 3)}
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}


def plain(history, decay):
    """The average in one line per step; `history[0]` is its start."""
    shadow = {n: p.float().clone() for n, p in history[0].items()}
    for params in history[1:]:
        shadow = {n: s * decay + params[n].float() * (1.0 - decay) for n, s in shadow.items()}
    return shadow


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def slow_down(monkeypatch, seconds):
    fold = CpuEma._fold

    def slow(self, *args):
        time.sleep(seconds)
        fold(self, *args)

    monkeypatch.setattr(CpuEma, "_fold", slow)


@given(decay=st.floats(0, 0.9999), steps=st.integers(0, 5), bf16=st.booleans())
def test_equals_the_plain_average_bit_for_bit(decay, steps, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    history = [named(seed, dtype) for seed in range(steps + 1)]
    ema = CpuEma(history[0], decay)
    for params in history[1:]:
        ema.update(params)
    state = ema.state_dict()
    assert same(state["shadow"], plain(history, decay)) and int(state["updates"]) == steps


def test_a_slow_worker_never_sees_later_parameters(monkeypatch):
    """The optimizer overwrites the parameters right after update(); the worker is late every time."""
    slow_down(monkeypatch, 0.02)
    history = [named(seed) for seed in range(6)]
    params = {n: p.clone() for n, p in history[0].items()}
    ema = CpuEma(params, 0.9)
    for later in history[1:]:
        for name, param in params.items():
            param.copy_(later[name])
        ema.update(params)
        for param in params.values():
            param.fill_(float("nan"))
    assert same(ema.state_dict()["shadow"], plain(history, 0.9))


def test_update_returns_before_the_worker_is_done(monkeypatch):
    gate = threading.Event()
    fold = CpuEma._fold
    monkeypatch.setattr(CpuEma, "_fold", lambda self, *a: (gate.wait(10), fold(self, *a))[1])
    ema = CpuEma(named(0), 0.5)
    ema.update(named(1))
    ema.update(named(2))  # both buffers are taken and neither is folded in
    assert same(ema._shadow, named(0))
    gate.set()
    ema.update(named(3))
    assert same(ema.state_dict()["shadow"], plain([named(i) for i in range(4)], 0.5))


def test_average_is_a_copy_and_state_is_a_copy():
    params = named(0)
    ema = CpuEma(params, 0.5)
    params["scalar"].fill_(9)
    state = ema.state_dict()
    assert same(state["shadow"], named(0))
    state["shadow"]["scalar"].fill_(7)
    assert same(ema.state_dict()["shadow"], named(0))


def test_resume_continues_exactly():
    history = [named(seed) for seed in range(7)]
    ema = CpuEma(history[0], 0.99)
    for params in history[1:4]:
        ema.update(params)
    state = ema.state_dict()
    resumed = CpuEma(history[3], 0.99)
    resumed.load_state_dict(state)
    for params in history[4:]:
        resumed.update(params)
    end = resumed.state_dict()
    assert same(end["shadow"], plain(history, 0.99)) and int(end["updates"]) == 6


def test_swap_shows_the_average_and_restores_every_bit():
    history = [named(0, torch.bfloat16), named(1, torch.bfloat16)]
    params = history[1]
    before = {n: p.clone() for n, p in params.items()}
    ema = CpuEma(history[0], 0.75)
    ema.update(params)
    want = {n: s.bfloat16() for n, s in plain(history, 0.75).items()}
    pointers = [p.data_ptr() for p in params.values()]
    with pytest.raises(KeyError, match="inside"), ema.swap(params):
        assert same(params, want)
        with pytest.raises(ArgumentError, match="swap"):
            ema.update(params)
        with pytest.raises(ArgumentError, match="swapped twice"), ema.swap(params):
            pass
        raise KeyError("inside")
    assert same(params, before) and pointers == [p.data_ptr() for p in params.values()]
    ema.update(params)  # and goes on


def test_swap_accepts_module_parameters():
    layer = torch.nn.Linear(3, 2)
    ema = CpuEma(dict(layer.named_parameters()), 0.5)
    with torch.no_grad():
        before = layer.weight.clone()
        layer.weight.add_(1.0)
    with ema.swap(dict(layer.named_parameters())):
        assert torch.equal(layer.weight.detach(), before)
    assert torch.equal(layer.weight.detach(), before + 1.0) and layer.weight.requires_grad


@pytest.mark.parametrize("call", ["wait", "state_dict", "update"])
def test_a_failure_of_the_worker_surfaces(monkeypatch, call):
    def broken(self, *args):
        raise MemoryError("no room")

    monkeypatch.setattr(CpuEma, "_fold", broken)
    ema = CpuEma(named(0), 0.5)
    ema.update(named(1))
    ema.update(named(2))
    for _ in range(2):  # and stays
        with pytest.raises(RuntimeError, match="background failed: no room"):
            getattr(ema, call)(*([named(3)] if call == "update" else []))


def test_argument_errors():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match="decay: must be in"):
            CpuEma(named(), decay)
    with pytest.raises(ArgumentError, match=r"params\['x'\]: must be float32 or bfloat16; got int64"):
        CpuEma({"x": torch.zeros(1, dtype=torch.int64)}, 0.5)
    ema = CpuEma(named(), 0.5)
    with pytest.raises(ArgumentError, match="difference in scalar"):
        ema.update({n: p for n, p in named().items() if n != "scalar"})
    with pytest.raises(ArgumentError, match=r"params\['a.norm'\]: must have shape \[7\]"):
        ema.update({**named(), "a.norm": torch.zeros(8)})
    with pytest.raises(ArgumentError, match="shadow: must be a mapping"):
        ema.load_state_dict({"updates": torch.tensor(1)})
    with pytest.raises(ArgumentError, match="updates: must be"):
        ema.load_state_dict({"updates": 1, "shadow": named()})
    with pytest.raises(ArgumentError, match=r"shadow\['a.weight'\]: must be float32"):
        ema.load_state_dict({"updates": torch.tensor(1), "shadow": named(0, torch.bfloat16)})
    assert same(ema.state_dict()["shadow"], named())


def test_no_parameters_is_legal():
    ema = CpuEma({}, 0.5)
    ema.update({})
    assert ema.state_dict()["shadow"] == {}
