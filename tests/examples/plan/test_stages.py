"""Cutting the model: nothing lost, and as even as whole layers allow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from examples.configs import get_config
from examples.plan.model_costs import blocks
from examples.plan.plan import Plan
from examples.plan.stages import cut
from tests.examples.plan.conftest import plan_of

V3 = get_config("v3_671b").model


def test_the_report(report_plan: Plan) -> None:
    layers = [sum(b.kind in ("dense", "moe") for b in stage) for stage in report_plan.stages]
    assert sum(layers) == 61
    assert max(layers) == 4  # as in the published trace: "each chunk contains 4 MoE layers"
    first, last = report_plan.held(0)
    assert first[0].kind == "embedding" and [b.kind for b in last][-2:] == [
        "head",
        "mtp",
    ]  # 3.2.3: on one rank


@pytest.mark.parametrize("pp", [1, 2, 4, 8, 16, 32])
def test_every_block_once_and_in_order(pp: int) -> None:
    every = list(blocks(V3, 4096))
    stages = cut(every, pp, lambda b: b.model_flops)
    assert len(stages) == pp
    assert list(itertools.chain(*stages)) == every
    assert all(stage for stage in stages)


@pytest.mark.parametrize(("layers", "pp"), [(9, 4), (10, 4), (13, 6), (7, 2), (16, 8)])
@pytest.mark.parametrize("extra", [0.1, 2.5])
def test_as_even_as_brute_force(layers: int, pp: int, extra: float) -> None:
    """The heaviest pair of mirrored stages is as light as any split of whole layers over pairs makes it."""
    every = list(blocks(replace(V3, num_layers=layers, num_dense_layers=0), 4096))
    weights = {"moe": 1.0, "head": extra, "mtp": extra, "embedding": 0.0}
    stages = cut(every, pp, lambda b: weights[b.kind])
    pairs = [
        sum(weights[b.kind] for stage in (stages[r], stages[-1 - r]) for b in stage) for r in range(pp // 2)
    ]
    splits = itertools.product(range(2, layers + 1), repeat=pp // 2)
    best = min(max(s[0] + 2 * extra, *s[1:], 0) for s in splits if sum(s) == layers)
    assert max(pairs) == pytest.approx(best)


def test_held() -> None:
    plan = plan_of("v3_16b", gpus=8, pp=4, ep=2, batch=64)
    assert plan.held(1) == (plan.stages[1], plan.stages[2])
    assert len(plan_of("v3_16b", gpus=8, pp=1, ep=8, batch=64).held(0)) == 1
