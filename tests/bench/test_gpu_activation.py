"""SwiGLU and its casts on silicon: run by `python -m bench.prove`, never in CI.

Names matter: bench/proof/families finds its evidence by them.
"""

from __future__ import annotations

import pytest

import deepseek_ops
from bench.activation import SHARE, arguments, op_of
from bench.proof.families.activation import SHARES
from bench.proof.rows import difference, same_bits, tensors
from deepseek_ops import activation, quantize

from .gpu import agrees, large, need_kernel, on_cpu, on_gpu, repeats, replays

pytestmark = pytest.mark.gpu

SHAPES = [(1, 128), (7, 256), (130, 384), large(515, 2048), (257, 128)]


@pytest.mark.parametrize(("tokens", "inner"), SHAPES)
@pytest.mark.parametrize("kernel", SHARES)
def test_swiglu_values(kernel: str, tokens: int, inner: int) -> None:
    """e^x is within 2^-21 and 1/x within 2^-22 (docs/numerics.md), so that few elements round to a neighbour."""
    need_kernel(op_of(kernel).name)
    agrees(op_of(kernel), *arguments(kernel, tokens, inner, "cpu"), share=SHARE)


def test_swiglu_values_of_special_gates() -> None:
    """Large gates of either sign neither overflow nor turn into NaN; NaN stays in its element."""
    gate_up, weight = arguments("swiglu", 6, 256, "cpu")
    for row, value in enumerate((100.0, -100.0, 3e38, -3e38, float("nan"), 0.0)):
        gate_up[row, :256:2] = value
    for kernel, given in (
        ("swiglu", (gate_up, weight)),
        ("swiglu_backward", (gate_up[:, 256:], gate_up, weight)),
    ):
        with deepseek_ops.backend("modelled"):
            want = tensors(op_of(kernel)(*given))
        with deepseek_ops.backend("cuda"):
            got = on_cpu(op_of(kernel)(*on_gpu(given)))
        for g, w in zip(got, want, strict=True):
            assert not (wrong := difference([g], [w], SHARE)), wrong


@pytest.mark.parametrize("grouped", [False, True])
def test_swiglu_values_are_those_of_single_ops(grouped: bool) -> None:
    """Fusing the casts changes no bit: on the same device the composition agrees exactly."""
    kernel = "swiglu_backward_quantize" + ("_grouped" if grouped else "")
    given = on_gpu(arguments(kernel, 300, 384, "cpu"))
    dy, gate_up, _, weight = given[:4]
    offsets = given[4] if grouped else None
    with deepseek_ops.backend("cuda"):
        casts = activation.swiglu_backward_quantize(dy, gate_up, weight, offsets=offsets)
        dgate_up, dweight = activation.swiglu_backward(dy, gate_up, weight)
        q, scale, q_t, scale_t = quantize.quantize_1x128_128x1(dgate_up, offsets=offsets)[:4]
        act_t, act_scale_t = quantize.quantize_128x1(activation.swiglu(gate_up, weight), offsets=offsets)[:2]
    want = (q, scale, q_t, scale_t, act_t, act_scale_t, dweight)
    assert all(map(same_bits, casts[:7], want))


@pytest.mark.parametrize("kernel", SHARES)
def test_swiglu_repeat(kernel: str) -> None:
    repeats(op_of(kernel), *arguments(kernel, 1000, 512, "cpu"))


@pytest.mark.parametrize("kernel", SHARES)
def test_swiglu_graph(kernel: str) -> None:
    replays(op_of(kernel), *(arguments(kernel, 300, 256, "cpu", seed) for seed in (0, 1)))
