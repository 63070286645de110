"""Configurations: the report's sizes to the parameter, typed overrides, and errors that name the nearest key."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from examples.configs import (
    CONFIG_NAMES,
    ModelConfig,
    YarnConfig,
    get_config,
    parse_overrides,
    quick,
    run_config_from_dict,
    to_dict,
)
from examples.errors import UserError
from examples.model.transformer import Transformer


def meta(name):
    with torch.device("meta"):
        return Transformer(get_config(name).model)


def test_the_671b_model_has_the_reports_size_and_builds_at_once():
    start = time.monotonic()
    model = meta("v3_671b")
    assert time.monotonic() - start < 10
    assert model.num_parameters() == 671_026_404_352
    assert model.num_parameters(mtp=True) == 11_610_067_968
    assert round(model.num_parameters() / 1e9, 3) == 671.026
    assert round(model.num_parameters(mtp=True) / 1e9, 2) == 11.61


def test_active_parameters_are_those_the_report_counts():
    """37B activated per token (abstract): everything but the experts that were not chosen."""
    config = get_config("v3_671b").model
    expert = 3 * config.hidden_size * config.expert_inner_size
    idle = (config.num_experts - config.top_k) * expert * config.num_moe_layers
    assert round((meta("v3_671b").num_parameters() - idle) / 1e9, 2) == 37.55


def test_the_other_sizes():
    assert 15e9 < meta("v3_16b").num_parameters() < 16.5e9
    tiny = meta("tiny")
    assert 2.1e6 < tiny.num_parameters() + tiny.num_parameters(mtp=True) < 2.3e6
    small = meta("small")
    assert 15e6 < small.num_parameters() + small.num_parameters(mtp=True) < 30e6


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_json_round_trip_and_immutability(name):
    config = get_config(name)
    assert config.name == name
    assert run_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 3
    assert quick(config).train.schedule.total_tokens == config.train.schedule.total_tokens // 3


def test_yarn_survives_json():
    config = parse_overrides(get_config("tiny"), ["model.yarn.factor=4", "model.yarn.original_max=256"])
    assert config.model.yarn == YarnConfig(factor=4.0, original_max=256)
    assert run_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_overrides_take_the_type_of_the_field():
    config = parse_overrides(
        get_config("tiny"),
        [
            "model.hidden_size=256",
            "model.q_lora_rank=none",
            "model.recompute=true",
            "model.precision=bf16",
            "train.schedule.learning_rate.peak=1e-3",
            "train.schedule.total_tokens=1.5e6",
            "data.sources=english, code",
            "data.weights=0.25,0.75",
            "data.document_mask=on",
            "name=my run",
        ],
    )
    assert config.model.hidden_size == 256 and type(config.model.hidden_size) is int
    assert config.model.q_lora_rank is None and config.model.recompute is True
    assert config.model.precision == "bf16" and config.train.schedule.learning_rate.peak == 1e-3
    assert config.train.schedule.total_tokens == 1_500_000 and type(config.train.schedule.total_tokens) is int
    assert config.data.sources == ("english", "code") and config.data.weights == (0.25, 0.75)
    assert config.data.document_mask is True and config.name == "my run"
    assert get_config("tiny").model.hidden_size == 128  # the original is untouched


def test_overrides_of_one_section_take_effect_together():
    """Each alone would break a rule; together they are fine."""
    config = parse_overrides(get_config("tiny"), ["model.num_experts=12", "model.num_groups=3"])
    assert (config.model.num_experts, config.model.num_groups) == (12, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "model.hiden_size: there is no such key; did you mean 'model.hidden_size'?"),
        ("modle.hidden_size=3", "modle: there is no such key; did you mean 'model'?"),
        ("model.hidden_size=wide", "model.hidden_size: must be a whole number; got 'wide'"),
        ("model.hidden_size=1.5", "model.hidden_size: must be a whole number; got '1.5'"),
        ("model.q_lora_rank=x", "model.q_lora_rank: must be a whole number or none; got 'x'"),
        ("model.precision=fp4", "model.precision: must be fp32 or bf16 or fp8; got 'fp4'"),
        ("model.recompute=maybe", "model.recompute: must be true or false; got 'maybe'"),
        ("data.weights=a,b", "data.weights[0]: must be a number; got 'a'"),
        ("train.ema_decay.x=1", "train.ema_decay: is a value, not a section; got a key in it: 'x'"),
        ("train=3", "train: must be a section TrainConfig; got '3'"),
        ("hidden", "override: must be section.key=value; got 'hidden'"),
        ("=3", "override: must be section.key=value; got '=3'"),
        ("model.top_k=9", "model.top_k: must be at most the 8 experts in top_groups; got 9"),
        ("model.num_groups=5", "model.num_groups: must divide num_experts = 16; got 5"),
        ("model.qk_rope_head_dim=15", "model.qk_rope_head_dim: must be even; got 15"),
        ("model.yarn.factor=0.5", "model.yarn.factor: must be at least 1; got 0.5"),
        ("model.hidden_size=0", "model.hidden_size: must be at least 1; got 0"),
        ("data.seq_len=512", "data.seq_len: must be at most model.max_positions = 256; got 512"),
        ("train.ema_decay=1", "train.ema_decay: must be in [0, 1); got 1.0"),
        (
            "train.schedule.sequence_length=128",
            "data.seq_len: must be train.schedule.sequence_length = 128; got 256",
        ),
    ],
)
def test_a_bad_override_is_one_clear_line(override, message):
    with pytest.raises(UserError) as error:
        parse_overrides(get_config("tiny"), [override])
    assert str(error.value) == message


def test_none_empties_a_list():
    assert parse_overrides(get_config("tiny"), ["data.weights=none"]).data.weights is None


def test_a_section_and_a_key_in_it_cannot_both_be_set():
    for order in (["model.yarn=none", "model.yarn.factor=2"], ["model.yarn.factor=2", "model.yarn=none"]):
        with pytest.raises(UserError, match=r"model.yarn.*: one override sets the whole section"):
            parse_overrides(get_config("tiny"), order)


def test_from_dict_refuses_what_it_does_not_know():
    assert ModelConfig.from_dict({"hidden_size": 64}).hidden_size == 64
    assert ModelConfig.from_dict({"yarn": {"factor": 2}}).yarn == YarnConfig(factor=2.0)
    cases = [
        ({"num_head": 4}, "model.num_head: there is no such key; did you mean 'model.num_heads'?"),
        ({"hidden_size": "64"}, "model.hidden_size: must be a whole number; got '64'"),
        ({"hidden_size": True}, "model.hidden_size: must be a whole number; got True"),
        ({"yarn": {"facto": 2}}, "model.yarn.facto: there is no such key; did you mean 'model.yarn.factor'?"),
        ({"yarn": 3}, "model.yarn: must be a section YarnConfig or none; got 3"),
        ([1], "model: must be a table of keys and values; got [1]"),
    ]
    for values, message in cases:
        with pytest.raises(UserError) as error:
            ModelConfig.from_dict(values)
        assert str(error.value) == message
    with pytest.raises(UserError, match="name: is missing and has no default"):
        run_config_from_dict({})


def test_an_unknown_configuration_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'v3_671b'"):
        get_config("v3-671b")
    with pytest.raises(UserError, match="must be one of tiny, small, v3_16b, v3_671b"):
        get_config("enormous")


def test_reading_a_configuration_does_not_import_torch():
    code = "import sys; from examples.configs import get_config; get_config('v3_671b'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
