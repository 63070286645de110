"""What the report says about post-training stands in the defaults, and small sizes keep its proportions."""

from dataclasses import replace

import pytest

from examples.configs import CONFIG_NAMES, get_config, parse_overrides, quick
from examples.errors import UserError


def test_the_reports_run():
    sft = get_config("v3_671b").sft
    assert (sft.schedule.peak, sft.schedule.final, sft.schedule.epochs) == (5e-6, 1e-6, 2)
    assert sft.bias_speed == 0.0 and sft.mtp_weight == 0.1 and sft.start == "extend"
    grpo = get_config("v3_671b").grpo
    assert grpo.normalization == "grpo" and grpo.replay and grpo.temperature == 1.0


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_proportions_and_room(name):
    config = get_config(name)
    assert config.sft.schedule.peak / config.sft.schedule.final == pytest.approx(5)
    assert config.grpo.max_new_tokens < config.data.seq_len


def test_overrides_and_limits():
    config = parse_overrides(get_config("tiny"), ["sft.schedule.peak=1e-4", "grpo.normalization=dapo"])
    assert config.sft.schedule.peak == 1e-4 and config.grpo.normalization == "dapo"
    for override, words in (
        ("sft.counts=1", "sft.counts: must be one for each of 5 sources"),
        ("sft.held_out_every=1", "sft.held_out_every: must be at least 2; got 1"),
        ("sft.schedule.epochs=0", "sft.schedule.epochs: must be at least 1; got 0"),
        ("distill.temperature=0", "distill.temperature: must be positive; got 0"),
        ("grpo.normalization=x", "grpo.normalization: must be grpo or"),
        ("grpo.gruop=3", "did you mean 'grpo.group'"),
    ):
        with pytest.raises(UserError, match=words):
            parse_overrides(get_config("tiny"), [override])


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_quick_is_shorter_but_keeps_what_reinforcement_learning_starts_from(name):
    whole, short = get_config(name), quick(get_config(name))
    assert short.grpo.steps < whole.grpo.steps and short.distill.problems < whole.distill.problems
    for source, before, after in zip(whole.sft.sources, whole.sft.counts, short.sft.counts, strict=True):
        assert after == (before if source == whole.grpo.task else before // 3)
    parts = ("train", "extend", "sft", "grpo", "distill", "reward", "benchmarks")
    assert replace(short, **{part: getattr(whole, part) for part in parts}) == whole
