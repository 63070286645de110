"""The report's own figures, within 10 %; and its layout is the best that there is for its cluster."""

from __future__ import annotations

import pytest

from examples.configs import cluster, get_config
from examples.configs.schedules import TOTAL_TOKENS
from examples.plan.hardware import get_hardware
from examples.plan.run import the_report
from examples.plan.search import search


def test_the_bill_within_ten_per_cent() -> None:
    main, phases, bill = the_report()
    assert [row.reported for row in bill] == [180e3, 3.7, 2664e3, 119e3, 5e3, 2788e3]
    for row in bill:
        assert abs(row.error) < 0.1, row
    assert main.fits and all(phase.fits for phase in phases)
    assert main.plan.micro_batches == 120 and main.plan.layout.dp == 128
    assert sum(phase.tokens for phase in phases) == pytest.approx(125.8e9, rel=1e-3)


def test_the_report_s_figures_agree_with_each_other() -> None:
    assert pytest.approx(cluster.PRETRAINING_HOURS) == cluster.HOURS_PER_TRILLION * TOTAL_TOKENS / 1e12
    assert (
        pytest.approx(cluster.DAYS_PER_TRILLION, rel=0.02) == cluster.HOURS_PER_TRILLION / cluster.GPUS / 24
    )
    parts = cluster.PRETRAINING_HOURS + cluster.CONTEXT_HOURS + cluster.POST_TRAINING_HOURS
    assert parts == cluster.TOTAL_HOURS


def test_mfu_by_its_definition() -> None:
    main, _, _ = the_report()
    tokens = 15360 * 4096 / main.step.seconds / 2048
    assert main.mfu_bf16 == pytest.approx(tokens * 250.457e9 / 989e12, rel=1e-4)
    assert main.mfu_fp8 == pytest.approx(main.mfu_bf16 * 989 / 1979)
    assert main.days == pytest.approx(14.8e12 / (tokens * 2048) / 86400)


def test_the_report_s_layout_wins_the_search() -> None:
    found = search(
        get_config("v3_671b").model,
        get_hardware("h800"),
        gpus=2048,
        seq_len=4096,
        batch=15360,
        tokens=14.8e12,
        micro_batches=(1,),
    )
    best = found.best.plan.layout
    assert (best.pp, best.ep) == (cluster.PIPELINE_PARALLEL, cluster.EXPERT_PARALLEL)
    assert all(r.fits for r in found.fitting) and not any(r.fits for r in found.too_large)
    speeds = [r.tokens_per_gpu for r in found.fitting]
    assert speeds == sorted(speeds, reverse=True)
