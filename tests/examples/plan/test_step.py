"""Seconds of a step: the published trace, the report's formulas, and what must be monotonic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.plan.hardware import EFFICIENCIES, HARDWARE, changed, rows
from examples.plan.links import chunk_links, row_bytes, visited
from examples.plan.plan import Plan
from examples.plan.simulated import pipeline_seconds
from examples.plan.step import rank_step, step_time
from tests.examples.plan.conftest import plan_of


def test_the_published_trace(report_plan: Plan) -> None:
    """A pair of chunks of four MoE layers with even routing: what deepseek-ai/profile-data measured, in ms."""
    even = replace(report_plan, assumptions=changed(EFFICIENCIES, {"rank_imbalance": 1.0}))
    assert [b.kind for b in even.held(4)[0]] == ["moe"] * 4
    step = rank_step(even, 4)
    terms = {name: 1e3 * seconds / even.micro_batches for name, seconds in step.terms.items()}
    assert terms["FP8 GEMM"] == pytest.approx(22.93 + 27.49 + 18.84, rel=0.02)
    assert terms["attention"] == pytest.approx(4.95 + 17.02, rel=0.02)
    assert terms["memory-bound kernels"] == pytest.approx(33.8, rel=0.02)
    assert terms["BF16 GEMM"] < 0.6  # the trace's 0.54 are gates
    assert 1e3 * step.pair == pytest.approx(129.0, rel=0.02)
    beside = 1e3 * chunk_links(even, even.held(4)[0])["beside compute"]
    # The trace's tokens reach 4 nodes each; even draws reach 3.6.
    assert beside * (4 * 7 / 8) / visited(even)[0] == pytest.approx(17.38 + 13.62 + 49.45, rel=0.02)


def test_terms_by_the_report_s_formulas(report_plan: Plan) -> None:
    step = step_time(report_plan)
    bubble = (16 // 2 - 1) * (step.pair + step.backward - 3 * step.weight)
    assert step.terms["pipeline bubble"] == pytest.approx(bubble)
    work = sum(step.terms[name] for name in ("FP8 GEMM", "BF16 GEMM", "attention", "memory-bound kernels"))
    alone = step.forward + step.backward
    rest = step.terms["gradients and weights of ZeRO-1"] + step.terms["optimizer"]
    assert step.seconds == pytest.approx((120 - 16) * step.pair + 16 * alone + bubble + rest)
    assert work + step.terms["all-to-all, exposed"] == pytest.approx((120 - 16) * step.pair + 16 * alone)
    assert step.pair < alone  # overlapping pays


def test_without_a_pipeline_everything_shows() -> None:
    plan = plan_of("v3_16b", gpus=8, pp=1, ep=8, batch=64)
    step = step_time(plan)
    links = chunk_links(plan, plan.stages[0])
    shown = plan.micro_batches * (links["forward alone"] + links["backward alone"])
    assert step.terms["all-to-all, exposed"] == pytest.approx(shown) and shown > 0
    assert step.terms["pipeline bubble"] == 0 and step.hidden == {}


def test_links_by_hand() -> None:
    inside = plan_of("v3_16b", gpus=8, pp=1, ep=8, batch=64)
    nodes, gpus = visited(inside)
    assert nodes == 0 and gpus == pytest.approx(8 * (1 - (7 / 8) ** 6) * 7 / 8)
    across = plan_of()
    nodes, gpus = visited(across)
    assert nodes == pytest.approx(
        4 * (1 - (3 / 4) ** 8) * 7 / 8
    )  # at most 4 nodes, one eighth of them its own
    assert gpus < 8
    dispatch, combine = row_bytes(across)
    assert dispatch - 7168 - 4 * 56 == 104 and combine == 14336
    # 4096 tokens with 3.15 rows to other nodes at 44 GB/s: this, and not NVLink, is the time.
    one = chunk_links(across, across.held(4)[0][:1])
    seconds = 1.1 * 4096 * nodes * (dispatch + combine) / (50e9 * 0.88)
    assert one["forward alone"] == pytest.approx(seconds)


def test_what_is_not_hidden_is_shown(report_plan: Plan) -> None:
    """A network at half speed cannot be hidden any more: the pair is as long as its communication."""
    card = HARDWARE["h800"]
    slow = replace(card, internode=replace(card.internode, number=25e9))
    step = rank_step(replace(report_plan, hardware=slow), 4)
    links = chunk_links(replace(report_plan, hardware=slow), report_plan.held(4)[0])
    assert step.pair == pytest.approx(links["beside compute"] + links["point-to-point"])
    assert step.terms["all-to-all, exposed"] > 3 * rank_step(report_plan, 4).terms["all-to-all, exposed"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([(2, 8), (4, 16), (8, 64), (16, 64), (16, 1)]),
    st.sampled_from(["fp8", "bf16", "hbm", "internode", "nvlink"]),
    st.floats(1.05, 4),
)
def test_a_better_card_is_never_slower(layout: tuple[int, int], name: str, factor: float) -> None:
    plan = plan_of(pp=layout[0], ep=layout[1], batch=30720)
    value = getattr(plan.hardware, name)
    better = replace(plan.hardware, **{name: replace(value, number=value.number * factor)})
    assert step_time(replace(plan, hardware=better)).seconds <= step_time(plan).seconds * (1 + 1e-12)


@pytest.mark.parametrize(
    ("pp", "ep", "batch"), [(16, 64, 15360), (16, 64, 30720), (8, 64, 15360), (4, 16, 30720)]
)
def test_the_event_simulator_agrees(pp: int, ep: int, batch: int) -> None:
    """The formula, which knows no order of chunks, and every chunk played in the published order."""
    plan = plan_of(pp=pp, ep=ep, batch=batch)
    step = step_time(plan)
    formula = step.seconds - step.terms["gradients and weights of ZeRO-1"] - step.terms["optimizer"]
    assert pipeline_seconds(plan) == pytest.approx(formula, rel=0.04)


def test_more_micro_batches_dilute_the_bubble() -> None:
    shares = []
    for batch in (7680, 15360, 30720):
        step = step_time(plan_of(batch=batch))
        shares.append(step.terms["pipeline bubble"] / step.seconds)
    assert shares[0] > shares[1] > shares[2]


def test_every_assumption_has_a_source() -> None:
    for card in HARDWARE.values():
        for name, value in rows(card, EFFICIENCIES):
            assert value.source and value.number > 0, (card.name, name)
            assert value.kind != "measured"  # only the ledger may say so
