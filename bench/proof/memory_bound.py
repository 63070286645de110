"""Ops that are bound by memory: the op beside a copy of as many bytes, its result checked on a small input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .measure import compare
from .rows import GBPS, Call, Floor, Row, add_rates, copy_of, difference, line, on, step, this_card
from .steps import Data

SUSTAINED_S = 0.5
Arguments = tuple[Any, ...]


def bytes_of(values: Iterable[Any]) -> int:
    """Of the tensors among the values, those in lists included."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += bytes_of(value)
    return total


@dataclass(frozen=True)
class Case:
    """One op on one input.

    op:        takes what `draw` returns
    draw:      the arguments on a device; on "meta" only their shapes count
    sample:    arguments small enough for the truth
    truth:     the backend that knows the sample's result
    differs:   what is wrong with a result, given the truth
    pure:      `op` without its effects, for the sample, where it writes in place
    moved:     bytes that any version reads and writes; None: arguments and outputs, each once
    baselines: what takes turns with ours beside the copy, given ours' arguments
    """

    kernel: str
    shape: str
    op: Callable[..., Any]
    draw: Callable[[str], Arguments]
    sample: Callable[[str], Arguments]
    truth: str = "reference"
    differs: Callable[[Any, Any], str] = difference
    pure: Callable[..., Any] | None = None
    moved: int | None = None
    baselines: Callable[..., dict[str, Call]] = lambda *arguments: {}

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel} {self.shape}"

    @property
    def floor_bytes(self) -> int:
        """What any version reads and writes, each once."""
        if self.moved is not None:
            return self.moved
        given = self.draw("meta")
        outputs = self.op(*given)
        return bytes_of(given) + bytes_of(outputs if isinstance(outputs, tuple) else (outputs,))


def floor_us(case: Case, gbps: float = GBPS) -> Floor:
    """Microseconds at the data sheet's bandwidth."""
    return {"bytes": case.floor_bytes / (gbps * 1e3)}


def measure(case: Case, eager: bool = True) -> Row:
    """Ours, the copy and the other baselines in turns, eager PyTorch (the reference on this GPU) too; then the sample."""
    size, given = case.floor_bytes, case.draw("cuda")
    ours = on("cuda", lambda: case.op(*given))
    others = case.baselines(*given)
    if eager and "eager" not in others:
        others["eager"] = on("reference", lambda: case.op(*given))
    timed = compare({"ours": ours, "copy": copy_of(size), **others}, sustained_s=SUSTAINED_S)
    add_rates(timed, size=size)
    if "median_us" in timed["ours"]:
        result, small = case.pure or case.op, case.sample("cuda")
        wrong = case.differs(*(on(backend, lambda: result(*small))() for backend in ("cuda", case.truth)))
        timed["ours"]["correct"] = not wrong
        if wrong:
            timed["ours"]["wrong"] = wrong
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "input_bytes": bytes_of(given),
        "floor_us": floor_us(case, this_card()[0]),
        "candidates": timed,
    }


def bench(cases: Iterable[Case]) -> Data:
    """A step of the proof, without eager PyTorch: its minutes go elsewhere."""
    rows = []
    for case in cases:
        rows.append(measure(case, eager=False))
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    return step(rows)
