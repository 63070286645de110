"""FLOPs and parameters against the model itself and against figures that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.configs import CONFIG_NAMES, get_config
from examples.model.transformer import Transformer
from examples.plan.model_costs import blocks, expert_parameters, layer, mla_parameters, totals

V3 = get_config("v3_671b").model


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = get_config(name).model
    with torch.device("meta"):
        model = Transformer(config)
    counted = totals(config, 128)
    assert counted.parameters == model.num_parameters()
    assert counted.mtp_parameters == model.num_parameters(mtp=True)


def test_known_figures() -> None:
    counted = totals(V3, 4096)
    assert counted.parameters == 671_026_404_352
    assert round(counted.active_parameters / 1e9, 2) == 37.55
    assert round(sum(mla_parameters(V3).values()) / 1e6, 1) == 187.1
    assert round(counted.flops_per_token / 1e9) == 250
    attention = sum(3 * b.attention for b in blocks(V3, 4096) if b.kind != "mtp")
    assert round(attention / counted.flops_per_token, 2) == 0.12


def test_flops_are_six_per_active_weight_and_attention() -> None:
    """The rule of thumb holds exactly for all weights that multiply: everything but the input table and norms."""
    counted = totals(V3, 4096)
    norms = sum(2 * V3.hidden_size + V3.q_lora_rank + V3.kv_lora_rank for _ in range(61)) + V3.hidden_size
    multiplying = counted.active_parameters - V3.vocab_size * V3.hidden_size - norms
    attention = sum(3 * b.attention for b in blocks(V3, 4096) if b.kind != "mtp")
    assert counted.flops_per_token == pytest.approx(6 * multiplying + attention, rel=1e-12)


def test_attention_sums_over_what_each_token_sees() -> None:
    seq_len = 37
    seen = sum(range(1, seq_len + 1))
    a_layer = layer(V3, "moe", seq_len)
    assert a_layer.attention * seq_len == pytest.approx(2 * seen * 128 * (192 + 128))
    # Backward: scores again, dP and dV of value width, dQ and dK of key width.
    assert a_layer.attention_backward * seq_len == pytest.approx(2 * seen * 128 * (3 * 192 + 2 * 128))


def test_repeats() -> None:
    """Recomputation repeats both up-projections; sharing a sequence among 8 repeats that of keys and values 7 times."""
    up = mla_parameters(V3)
    assert layer(V3, "moe", 4096).recomputed == 2 * (up["q_b"] + up["kv_b"])
    assert layer(replace(V3, recompute=False), "moe", 4096).recomputed == 0
    assert layer(V3, "moe", 4096).repeated == 0
    assert layer(V3, "moe", 32768, 8).repeated == 2 * 7 * up["kv_b"]
    assert layer(V3, "moe", 32768, 8).model_flops == layer(V3, "moe", 32768).model_flops


def test_dense_and_moe_layers_of_v3_cost_the_same() -> None:
    """18432 = 9 x 2048: the dense FFN is as wide as eight experts and the shared one."""
    dense, moe = layer(V3, "dense", 4096), layer(V3, "moe", 4096)
    assert dense.fp8_dense == moe.fp8_dense + moe.fp8_grouped
    assert moe.expert_parameters == 256 * expert_parameters(V3)
    assert 0 < moe.memory_routed < 1 and dense.memory_routed == 0
