"""Notice a loss spike before it reaches the weights.

The report trained without a rollback; a smaller run with a bad shard or a too high rate is not so lucky. Before each
update the guard predicts the loss and the logarithm of the gradient norm by their short exponential means, measures
the error of the prediction in units of its own recent size, and warns, skips the step, or stops. A loss or norm that
is not finite never updates the model, whatever the policy.

Why errors of a prediction and not deviations from one long mean: the loss falls steeply at first, and a variance
around a long mean would be the variance of that fall, too wide to notice anything. Only the upward side counts: a
falling loss is no accident. The statistics swallow a spike clipped to the threshold, so that one outlier does not
blind the guard and a lasting change of level is accepted after a few steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from examples.errors import UserError


@dataclass(frozen=True)
class GuardPolicy:
    """When something is a spike, and what then.

    action:      "warn" (report, update anyway), "skip" (do not update), "stop" (raise `UserError`).
    threshold:   a spike is an error above so many times its root mean square.
    mean_decay:  of the prediction, which looks back about 1 / (1 - decay) steps.
    decay:       of the mean square error, likewise.
    warmup:      observations before z-scores count; the first steps move too much.
    min_std:     floor of the root mean square, in units of |mean| for the loss and absolute for log(norm).
    max_skipped: so many steps in a row without an update are an error: the run is broken, not unlucky.
    """

    action: Literal["warn", "skip", "stop"] = "warn"
    threshold: float = 6.0
    mean_decay: float = 0.9
    decay: float = 0.98
    warmup: int = 30
    min_std: float = 0.005
    max_skipped: int = 10

    def __post_init__(self) -> None:
        ok = (
            self.action in ("warn", "skip", "stop")
            and self.threshold > 0
            and 0 < self.decay < 1
            and 0 < self.mean_decay < 1
        )
        if not (ok and self.warmup >= 2 and self.min_std > 0 and self.max_skipped >= 1):
            raise UserError(f"loss guard: a setting is out of range: {self}")


@dataclass(frozen=True)
class Verdict:
    """`update`: whether the optimizer may run. `reason`: why it is suspicious, or None. z-scores are 0 in warm-up."""

    update: bool
    reason: str | None = None
    z_loss: float = 0.0
    z_norm: float = 0.0


@dataclass
class _Running:
    """Exponential mean, and mean square of its one-step prediction errors; both corrected for their start at zero."""

    count: int = 0
    mean: float = 0.0
    mean_weight: float = 0.0
    square: float = 0.0
    square_weight: float = 0.0

    def add(self, value: float, policy: GuardPolicy) -> None:
        error = value - self.mean
        if self.count:
            self.square_weight = policy.decay * self.square_weight + (1.0 - policy.decay)
            self.square += (1.0 - policy.decay) / self.square_weight * (error * error - self.square)
        self.mean_weight = policy.mean_decay * self.mean_weight + (1.0 - policy.mean_decay)
        self.mean += (1.0 - policy.mean_decay) / self.mean_weight * error
        self.count += 1


@dataclass
class LossGuard:
    """Call `check` after the backward pass, before the optimizer; obey `verdict.update`.

    Under data parallelism give it the loss and norm of the whole batch, so that every rank decides alike.
    """

    policy: GuardPolicy = field(default_factory=GuardPolicy)
    skipped: int = 0  # in a row
    total_spikes: int = 0
    _loss: _Running = field(default_factory=_Running)
    _norm: _Running = field(default_factory=_Running)

    def check(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge one step. Raises `UserError` if the policy says stop or too many steps in a row were skipped."""
        loss, grad_norm = float(loss), float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.total_spikes += 1
            reason = f"loss {loss:g}, gradient norm {grad_norm:g}: not finite"
            return self._act(step, Verdict(False, reason))
        log_norm = math.log(max(grad_norm, 1e-30))
        policy = self.policy
        z_loss = self._observe(self._loss, loss, policy.min_std * abs(self._loss.mean))
        z_norm = self._observe(self._norm, log_norm, policy.min_std)
        reasons = [
            f"{name} {value:g} is above its recent mean by {z:.1f} times its usual error"
            for name, value, z in (("loss", loss, z_loss), ("gradient norm", grad_norm, z_norm))
            if z > policy.threshold
        ]
        if not reasons:
            self.skipped = 0
            return Verdict(True, None, z_loss, z_norm)
        self.total_spikes += 1
        verdict = Verdict(policy.action == "warn", "; ".join(reasons), z_loss, z_norm)
        return self._act(step, verdict)

    def state_dict(self) -> dict[str, Any]:
        """JSON; floats survive exactly."""
        return {
            "skipped": self.skipped,
            "total_spikes": self.total_spikes,
            "loss": asdict(self._loss),
            "norm": asdict(self._norm),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.total_spikes = state["skipped"], state["total_spikes"]
        self._loss, self._norm = _Running(**state["loss"]), _Running(**state["norm"])

    def _observe(self, running: _Running, value: float, floor: float) -> float:
        """The z-score of `value` against the past, then add it, clipped upwards at the threshold."""
        policy = self.policy
        if running.count < policy.warmup:
            running.add(value, policy)
            return 0.0
        std = max(math.sqrt(running.square), floor, 1e-12)
        z = (value - running.mean) / std
        running.add(min(value, running.mean + policy.threshold * std), policy)
        return z

    def _act(self, step: int, verdict: Verdict) -> Verdict:
        if self.policy.action == "stop":
            raise UserError(
                f"step {step}: {verdict.reason}; stopped before the update. Resume from the last checkpoint with a "
                f"lower learning rate, or set the guard's action to skip"
            )
        if verdict.update:
            self.skipped = 0
            return verdict
        self.skipped += 1
        if self.skipped >= self.policy.max_skipped:
            raise UserError(
                f"step {step}: {self.skipped} steps in a row without an update; the last: {verdict.reason}"
            )
        return verdict
