"""Every published number and boundary (report sections 4.2, 4.3, 5.1), and the scaled run keeps the shape."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.configs import schedules as s
from examples.configs.schedules import REPORT

B, T = 10**9, 10**12
LR = REPORT.learning_rate
TINY = REPORT.scaled(
    1_200_000,
    sequence_length=256,
    start_batch=4,
    end_batch=16,
    warmup_fraction=0.05,
    peak_lr=3e-3,
    bias_speed=0.01,
)
tokens_of_report = st.integers(0, 16 * T)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 2.2e-4),
        (469 * B, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 4300 * B // 2, (2.2e-4 + 2.2e-5) / 2),
        (10 * T + 4300 * B // 4, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (14_300 * B - 1, 2.2e-5),
        (14_300 * B, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_800 * B - 1, 7.3e-6),
        (14_800 * B, 7.3e-6),
        (20 * T, 7.3e-6),
    ],
)
def test_learning_rate_at_every_boundary(tokens, rate):
    assert LR(10**6, tokens) == pytest.approx(rate, rel=1e-12)


def test_warm_up_counts_steps():
    assert [LR(step, 0) for step in (0, 500, 1000, 2000, 2001)] == pytest.approx(
        [0, 5.5e-5, 1.1e-4, 2.2e-4, 2.2e-4]
    )
    assert LR(1999, 0) < LR(2000, 0) == 2.2e-4
    assert dataclasses.replace(LR, warmup_steps=0)(0, 0) == 2.2e-4


def test_phases_add_up_to_the_published_total():
    assert LR.final_until + s.LAST_LR_TOKENS == REPORT.total_tokens == 14_800 * B
    assert REPORT.total_tokens - REPORT.bias_speed.switch == 500 * B  # "the remaining 500B"
    assert REPORT.total_tokens - REPORT.mtp_weight.switch == 4_800 * B  # "the remaining 4.8T"


@given(tokens_of_report, st.integers(1, 10**12))
def test_learning_rate_never_rises_after_warm_up(tokens, later):
    assert LR(2000, tokens) >= LR(2000, tokens + later)


@given(tokens_of_report.filter(lambda t: t != 14_633 * B - 1))
def test_learning_rate_is_continuous_except_at_the_published_drop(tokens):
    assert abs(LR(2000, tokens) - LR(2000, tokens + 1)) < 2.2e-4 * 1e-12
    # The steepest point of the cosine: pi / 2 * (peak - final) / length per token.
    jump = 62_914_560
    slope = math.pi / 2 * (2.2e-4 - 2.2e-5) / 4300e9
    if not tokens < 14_633 * B <= tokens + jump:
        assert LR(2000, tokens) - LR(2000, tokens + jump) <= slope * jump * (1 + 1e-9)


@given(st.integers(0, 2500))
def test_warm_up_rises_linearly(step):
    assert 0 <= LR(step + 1, 0) - LR(step, 0) <= 2.2e-4 / 2000 * (1 + 1e-12)


def test_batch_size_boundaries():
    size = REPORT.batch_size
    assert size(0) == 3072
    assert size(469 * B - 1) < size(469 * B) == size(14_800 * B) == 15360
    assert size(469 * B // 2) == 9216  # halfway, linear in tokens
    assert size(469 * B - 1) == 15360 - size.quantum


@given(st.integers(0, 500 * B), st.integers(0, 10 * B))
def test_batch_size_is_monotone_and_quantised(tokens, later):
    size = REPORT.batch_size
    assert 3072 <= size(tokens) <= size(tokens + later) <= 15360
    assert size(tokens) % size.quantum == 0
    line = 3072 + (15360 - 3072) * min(tokens / (469 * B), 1.0)
    assert line - size.quantum - 1e-3 <= size(tokens) <= line + 1e-3


def test_bias_speed_and_mtp_weight_switch_once():
    gamma, weight = REPORT.bias_speed, REPORT.mtp_weight
    assert [gamma(t) for t in (0, 14_300 * B - 1, 14_300 * B, 14_800 * B)] == [0.001, 0.001, 0.0, 0.0]
    assert [weight(t) for t in (0, 10 * T - 1, 10 * T, 14_800 * B)] == [0.3, 0.3, 0.1, 0.1]


def test_numbers_that_do_not_move():
    assert dataclasses.astuple(REPORT.optimizer)[:4] == (0.9, 0.95, 0.1, 1.0)
    assert (s.INIT_STD, s.FIM_RATE, REPORT.balance_alpha, REPORT.sequence_length) == (0.006, 0.1, 1e-4, 4096)


def test_context_phases():
    first, second = s.CONTEXT_PHASES
    assert (first.sequence_length, first.batch_size) == (32768, 1920)
    assert (second.sequence_length, second.batch_size) == (131072, 480)
    assert all(p.steps == 1000 and p.learning_rate == 7.3e-6 == LR.last for p in s.CONTEXT_PHASES)
    assert first.tokens == second.tokens == 62_914_560_000


def test_sft_cosine():
    rate = s.SftSchedule()
    assert (
        rate(0, 101) == 5e-6
        and rate(50, 101) == pytest.approx(3e-6)
        and rate(100, 101) == pytest.approx(1e-6)
    )
    assert rate(0, 1) == 5e-6 and rate(500, 101) == pytest.approx(1e-6) and rate.epochs == 2


@given(st.integers(0, 300), st.integers(1, 300))
def test_sft_never_rises(step, total):
    rate = s.SftSchedule()
    assert 1e-6 <= rate(step + 1, total) <= rate(step, total) <= 5e-6


def test_the_published_run_takes_about_240_thousand_steps():
    assert 238_000 < REPORT.count_steps() < 245_000


def test_scaled_run_keeps_every_fraction():
    rate = TINY.learning_rate
    assert rate.constant_until == round(1_200_000 * 10 / 14.8)
    assert rate.cosine_until == TINY.bias_speed.switch == round(1_200_000 * 14.3 / 14.8)
    assert rate.final_until == round(1_200_000 * 14.633 / 14.8)
    assert TINY.mtp_weight == s.TwoLevels(0.3, 0.1, rate.constant_until)
    assert TINY.batch_size.ramp_tokens == round(1_200_000 * 0.469 / 14.8)
    assert (rate.peak, rate.final, rate.last) == pytest.approx((3e-3, 3e-4, 3e-3 * 7.3 / 220))
    assert (TINY.bias_speed.before, TINY.bias_speed.after) == (0.01, 0.0)
    assert TINY.optimizer == REPORT.optimizer and TINY.balance_alpha == 1e-4
    assert rate.warmup_steps == round(TINY.count_steps() * 0.05)
    assert TINY.batch_size(0) == 4 and TINY.batch_size(TINY.total_tokens) == 16


def test_scaling_to_its_own_size_changes_only_warm_up():
    again = REPORT.scaled(
        REPORT.total_tokens, sequence_length=4096, start_batch=3072, end_batch=15360, batch_quantum=512
    )
    warmup = again.learning_rate.warmup_steps
    assert warmup == round(REPORT.count_steps() * 0.01)
    assert again == dataclasses.replace(REPORT, learning_rate=dataclasses.replace(LR, warmup_steps=warmup))


@given(
    total=st.integers(10_000, 10**8),
    start=st.integers(1, 8),
    growth=st.integers(0, 8),
    length=st.sampled_from([32, 256]),
)
def test_any_scaled_run_is_ordered_and_ends(total, start, growth, length):
    run = REPORT.scaled(total, sequence_length=length, start_batch=start, end_batch=start + growth)
    rate = run.learning_rate
    assert (
        0
        <= run.batch_size.ramp_tokens
        <= rate.constant_until
        <= rate.cosine_until
        <= rate.final_until
        <= total
    )
    if total < 10**6:  # walk it, as a training loop would
        step = tokens = 0
        rates = []
        while tokens < run.total_tokens:
            rates.append(rate(step, tokens))
            tokens += run.batch_size(tokens) * length
            step += 1
        assert step == run.count_steps()
        assert rates[0] == 0.0 and max(rates) <= rate.peak
        assert tokens - total < run.batch_size.end * length
