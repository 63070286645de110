"""What the tests on silicon have in common: the same inputs on both sides, twenty repeats, capture and replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import deepseek_ops
from bench.proof.rows import difference, same_bits, tensors
from deepseek_ops import quantize
from deepseek_ops._registry import OPS

REPEATS = 20


def large(*values: Any) -> Any:
    """A parameter set that only a GPU has the time for: tests/bench/rehearsal.py leaves it out."""
    return pytest.param(*values, marks=pytest.mark.large)


def need_kernel(op: str) -> None:
    """A module that lost a kernel is a failure, not a skip."""
    assert "cuda" in OPS[op].kernels, f"{op} has no cuda kernel"


def on_gpu(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The same arguments in GPU memory."""
    return tuple(
        [t.cuda() for t in a] if isinstance(a, list) else a.cuda() if isinstance(a, Tensor) else a
        for a in arguments
    )


def on_cpu(result: Any) -> tuple[Tensor, ...]:
    """Outputs where they can be compared."""
    return tuple(t.cpu() for t in tensors(result))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values, on the CPU: equal on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def fp8_operands(m: int, n: int, k: int, positive: bool = False) -> tuple[Tensor, ...]:
    """a with row scales, b with block scales."""
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * k)
    draw = torch.rand if positive else torch.randn
    x, w = (draw(rows, k, generator=generator).to(torch.bfloat16) for rows in (m, n))
    with deepseek_ops.backend("reference"):
        return (*quantize.quantize_1x128(x), *quantize.quantize_128x128(w))


def i32(values: Sequence[int]) -> Tensor:
    """Offsets or counts."""
    return torch.tensor(values, dtype=torch.int32)


def agrees(
    function: Callable[..., Any], *arguments: Any, share: float = 0.0, truth: str = "modelled", **options: Any
) -> None:
    """On the GPU what the model says: every bit, or up to rounding (`bench.proof.rows.difference`)."""
    with deepseek_ops.backend(truth):
        want = function(*arguments, **options)
    with deepseek_ops.backend("cuda"):
        got = function(*on_gpu(arguments), **options)
    if share:
        assert not (wrong := difference(on_cpu(got), tensors(want), share)), wrong
    else:
        assert all(map(same_bits, on_cpu(got), tensors(want)))


def repeats(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Twenty runs, one answer."""
    given = on_gpu(arguments)
    with deepseek_ops.backend("cuda"):
        first = tensors(function(*given, **options))
        for _ in range(REPEATS):
            assert all(map(same_bits, tensors(function(*given, **options)), first))


class Captured:
    """A call in a CUDA graph, on a stream that is not the default one; `outputs` is what each replay leaves."""

    def __init__(self, call: Callable[[], Any]) -> None:
        stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = tensors(call())

    def replay(self) -> tuple[Tensor, ...]:
        """What the graph computes from what its tensors hold now."""
        self.graph.replay()
        torch.cuda.synchronize()
        return self.outputs


def replays(function: Callable[..., Any], *many: Sequence[Any], **options: Any) -> None:
    """Captured once with the first arguments, replayed with each of them in the same tensors: the bits of plain calls.

    Only tensors may differ between the arguments.
    """
    with deepseek_ops.backend("cuda"):
        many = tuple(on_gpu(arguments) for arguments in many)
        static = tuple(
            [t.clone() for t in a] if isinstance(a, list) else a.clone() if isinstance(a, Tensor) else a
            for a in many[0]
        )
        captured = Captured(lambda: function(*static, **options))
        for arguments in many:
            for to, value in zip(static, arguments, strict=True):
                for target, source in zip(to, value, strict=True) if isinstance(to, list) else [(to, value)]:
                    if isinstance(target, Tensor):
                        target.copy_(source)
            want = tensors(function(*arguments, **options))
            for _ in range(2):
                assert all(map(same_bits, captured.replay(), want))
