"""A rehearsal of what only a GPU can do, on the CPU: the minutes of a lent machine are not for finding typing mistakes.

    PROOF_REHEARSAL=modelled pytest -m "gpu and not large" tests/bench      # or emulated, or checked
    with rehearsal("reference"): ...                                         # benchmarks on small shapes

Inside, backend "cuda" is another backend, device "cuda" is the CPU, a graph is its call and a measurement is one run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import bench.proof.measure
from bench.proof.rows import tensors
from deepseek_ops import _registry

from . import gpu

CARD = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)


class OnCpu(TorchFunctionMode):
    """Asked for a GPU, gives the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0].clone()  # a copy, as it would be there
        if func is torch.Tensor.to and args[1:] == ("cuda",):
            return args[0].clone()
        return func(*args, **kwargs)


class Rehearsed:
    """A captured call, made again at each replay."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.outputs = call, tensors(call())

    def replay(self) -> tuple[torch.Tensor, ...]:
        for to, value in zip(self.outputs, tensors(self.call()), strict=True):
            if to.data_ptr() != value.data_ptr():
                to.copy_(value)
        return self.outputs


def timed_once(candidates: dict[str, Callable[[], Any]], *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
    """Stands for bench.proof.measure.compare: ours takes 10 us, everything else 20 us."""
    results: dict[str, dict[str, Any]] = {}
    for name, call in candidates.items():
        try:
            call()
        except Exception as error:
            if name == "ours":
                raise
            results[name] = {"absent": f"{type(error).__name__}: {error}"[:300]}
            continue
        us = 10.0 if name == "ours" else 20.0
        sustained = {"mean_us": us, "calls": 1}
        results[name] = {
            "median_us": us,
            "p10_us": us,
            "p90_us": us,
            "min_us": us,
            "repeats": 1,
            "sustained": sustained,
        }
    return results


@contextlib.contextmanager
def rehearsal(backend: str, modules: tuple[Any, ...] = ()) -> Iterator[None]:
    """`modules`: those that have imported `compare` by name."""
    reason = _registry.absent_reason(backend)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    absent, generator = _registry.absent_reason, torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        for op in _registry.OPS.values():
            if backend in op.kernels:
                patch.setitem(op.kernels, "cuda", op.kernels[backend])
        patch.setattr(_registry, "absent_reason", lambda name: None if name == "cuda" else absent(name))
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: CARD.name)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: CARD)
        patch.setattr(gpu, "Captured", Rehearsed)
        for module in (bench.proof.measure, *modules):
            patch.setattr(module, "compare", timed_once)
        with OnCpu():
            yield
