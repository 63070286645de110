"""The guard passes ordinary training, catches spikes, never lets NaN through, and resumes exactly."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.errors import UserError
from examples.train.guard import GuardPolicy, LossGuard


def curve(step, rng):
    """A plausible run: steep fall, then noise around a slow decline; a heavy-tailed gradient norm."""
    loss = 2.5 + 5.0 * math.exp(-step / 60) + rng.gauss(0, 0.03)
    return loss, math.exp(rng.gauss(-1, 0.2)) * (1 + 5 * math.exp(-step / 20))


def trained(policy, steps=150, seed=0):
    guard, rng = LossGuard(policy), random.Random(seed)
    verdicts = [guard.check(step, *curve(step, rng)) for step in range(steps)]
    return guard, verdicts


@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm_in_a_plausible_run(seed):
    _, verdicts = trained(GuardPolicy(), steps=1000, seed=seed)
    assert all(v.update and v.reason is None for v in verdicts)
    assert all(v.z_loss == v.z_norm == 0 for v in verdicts[:30])
    assert any(v.z_loss != 0 for v in verdicts[30:])


@pytest.mark.parametrize(("loss", "norm", "name"), [(4.5, 0.4, "loss"), (2.6, 40.0, "gradient norm")])
def test_each_policy_on_a_spike(loss, norm, name):
    verdict = trained(GuardPolicy("warn"))[0].check(150, loss, norm)
    assert verdict.update and verdict.reason.startswith(name) and "times its usual error" in verdict.reason
    guard, _ = trained(GuardPolicy("skip"))
    verdict = guard.check(150, loss, norm)
    assert not verdict.update and name in verdict.reason and guard.skipped == guard.total_spikes == 1
    assert guard.check(151, 2.6, 0.4).update and guard.skipped == 0
    with pytest.raises(UserError, match=f"step 150: {name} .* stopped before the update"):
        trained(GuardPolicy("stop"))[0].check(150, loss, norm)


def test_downward_is_no_spike():
    assert trained(GuardPolicy("stop"))[0].check(150, 0.1, 1e-6).reason is None


@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    in_loss=st.booleans(),
    action=st.sampled_from(["warn", "skip"]),
    steps=st.sampled_from([0, 5, 60]),
)
def test_non_finite_never_updates_and_does_not_touch_the_statistics(bad, in_loss, action, steps):
    guard, _ = trained(GuardPolicy(action), steps)
    before = guard.state_dict()
    verdict = guard.check(steps, *((bad, 1.0) if in_loss else (2.5, bad)))
    assert not verdict.update and "not finite" in verdict.reason
    after = guard.state_dict()
    assert (after["loss"], after["norm"]) == (before["loss"], before["norm"]) and after["total_spikes"] == 1
    assert guard.check(steps + 1, 2.6, 0.4).update


def test_a_run_that_only_skips_ends():
    guard, _ = trained(GuardPolicy("warn", max_skipped=3))
    for step in (150, 151):
        assert not guard.check(step, math.nan, 1.0).update
    with pytest.raises(UserError, match="step 152: 3 steps in a row without an update"):
        guard.check(152, math.nan, 1.0)


def test_one_spike_does_not_blind_the_guard():
    guard, _ = trained(GuardPolicy("skip"))
    assert not guard.check(150, 1e6, 0.4).update
    assert not guard.check(151, 5.5, 0.4).update


def test_a_lasting_change_of_level_is_accepted():
    guard, _ = trained(GuardPolicy("warn"), steps=400)
    rng = random.Random(1)
    reasons = [guard.check(400 + i, 3.5 + rng.gauss(0, 0.03), 0.4).reason for i in range(200)]
    assert reasons[0] is not None and reasons[-1] is None


def test_statistics_are_the_weighted_moments():
    """The mean and the mean square prediction error against their definition: weights decay^age, normalised."""

    def weighted(values, decay):
        weights = [decay**age for age in range(len(values) - 1, -1, -1)]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    guard, rng = LossGuard(GuardPolicy(decay=0.95, mean_decay=0.8, warmup=1000)), random.Random(3)
    losses = [rng.uniform(1, 3) for _ in range(50)]
    for step, loss in enumerate(losses):
        guard.check(step, loss, math.exp(loss))
    errors = [losses[i] - weighted(losses[:i], 0.8) for i in range(1, 50)]
    for running in (guard.state_dict()["loss"], guard.state_dict()["norm"]):
        assert running["mean"] == pytest.approx(weighted(losses, 0.8), rel=1e-12)
        assert running["square"] == pytest.approx(weighted([e * e for e in errors], 0.95), rel=1e-9)


def test_z_score_is_against_the_past():
    guard = LossGuard(GuardPolicy(warmup=2, min_std=1e-9))
    for loss in (1.0, 3.0):
        guard.check(0, loss, 1.0)
    past = guard.state_dict()["loss"]
    assert guard.check(2, 2.9, 1.0).z_loss == (2.9 - past["mean"]) / math.sqrt(past["square"])


def test_a_constant_loss_has_a_floor_on_its_deviation():
    guard = LossGuard(GuardPolicy("skip", min_std=0.01))
    for step in range(50):
        assert guard.check(step, 2.0, 0.0).update  # also a gradient of exactly zero
    assert guard.check(50, 2.1, 0.0).update and not guard.check(51, 2.2, 0.0).update


@given(cut=st.integers(0, 79))
def test_resume_is_exact(cut):
    def observe(guard, first, last):
        rng = random.Random(7)
        values = [curve(i, rng) for i in range(80)]
        return [guard.check(i, *values[i]) for i in range(first, last)]

    whole = LossGuard()
    want = observe(whole, 0, 80)
    first = LossGuard()
    got = observe(first, 0, cut)
    second = LossGuard()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + observe(second, cut, 80) == want and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"action": "panic"},
        {"threshold": 0},
        {"decay": 1.0},
        {"mean_decay": 0.0},
        {"warmup": 1},
        {"min_std": 0.0},
        {"max_skipped": 0},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(UserError, match="loss guard"):
        GuardPolicy(**change)
