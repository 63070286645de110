"""Bytes per GPU, against hand formulas and sums over all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.configs import get_config
from examples.model.memory import kept_per_token
from examples.plan.memory import kept, memory, rank_memory
from examples.plan.model_costs import totals
from examples.plan.plan import Plan
from tests.examples.plan.conftest import plan_of

V3 = get_config("v3_671b").model


def test_the_report_fits(report_plan: Plan) -> None:
    """80 GB cards have 80 GiB, less what the driver keeps."""
    assert sum(memory(report_plan).values()) < report_plan.hardware.memory.number


@pytest.mark.parametrize(("pp", "ep"), [(1, 1), (1, 8), (2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", ["v3_16b", "small"])
def test_zero_shards_every_parameter_once(name: str, pp: int, ep: int) -> None:
    """Over all GPUs there are 4 bytes of master weight per parameter, moments as many, however the layout is."""
    config = get_config(name)
    plan = plan_of(name, gpus=8, pp=pp, ep=ep, batch=64, seq_len=config.data.seq_len)
    counted = totals(plan.model, plan.seq_len)
    parameters = counted.parameters + counted.mtp_parameters
    ranks = [rank_memory(plan, rank) for rank in range(pp)]
    masters = plan.layout.dp * sum(m["master weights, FP32, sharded"] for m in ranks)
    moments = plan.layout.dp * sum(m["moments, sharded"] for m in ranks)
    assert masters == pytest.approx(4 * parameters) and moments == pytest.approx(4 * parameters)
    # Gradients are whole: an expert's on one rank of EP, everything twice under DualPipe.
    copies = 2 if pp > 1 else 1
    if ep == 1:
        assert sum(m["gradients, FP32"] for m in ranks) == pytest.approx(4 * copies * parameters)


def test_activations_by_hand(report_plan: Plan) -> None:
    """Rank 4 has two stages of four MoE layers: 17 chunks of 4096 tokens, and the rows it received for its experts."""
    a_layer = sum(kept_per_token(V3).values()) + 8 * (7168 + 4 * 56) * 1.1
    assert rank_memory(report_plan, 4)["activations"] == pytest.approx(17 * 4096 * 4 * a_layer)
    # The received row is what docs/memory.md says: 7,392 bytes for each choice.
    moe = report_plan.held(4)[0][0]
    even = replace(
        report_plan, assumptions=replace(report_plan.assumptions, rank_imbalance=_one(report_plan))
    )
    assert kept(even, moe) - sum(kept_per_token(V3).values()) == pytest.approx(8 * 7392)


def _one(plan: Plan):
    return replace(plan.assumptions.rank_imbalance, number=1.0)


def test_bf16_keeps_one_copy_of_weights() -> None:
    fp8 = plan_of("v3_16b", gpus=8, pp=2, ep=4, batch=64)
    bf16 = plan_of(gpus=8, pp=2, ep=4, batch=64, model=replace(fp8.model, precision="bf16"))
    # FP8: two copies of a byte and scales; BF16: one of two bytes.
    assert memory(bf16)["weights"] == pytest.approx(memory(fp8)["weights"], rel=1e-3)
    assert memory(bf16)["activations"] > 1.5 * memory(fp8)["activations"]


def test_more_ranks_hold_less() -> None:
    def least(**changes: int) -> float:
        return sum(memory(plan_of(**changes)).values())

    assert least(ep=128) < least(ep=64) < least(ep=32)
    assert least(pp=32) < least(pp=16) < least(pp=8)
    assert least(micro_batch=2, batch=30720) > least()
