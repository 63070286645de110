"""Every number of the report's schedules, once, with its section, and the clocks that read them.

The report counts two clocks. Warm-up counts optimizer steps; everything after it counts tokens. A schedule here is a
frozen dataclass whose call is a pure function of those clocks, so that resuming needs no state and the tiny run
uses the same code as the 671B run: `REPORT.scaled(1_200_000, ...)` compresses the token axis and keeps the shape.

Section numbers are those of the DeepSeek-V3 technical report (arXiv 2412.19437). What it does not publish is marked
"unpublished" where we had to choose: the shape of the batch ramp, AdamW's eps, the groups without weight decay.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

BILLION = 10**9
TRILLION = 10**12

# The token milestones of section 4.2.
TOTAL_TOKENS = 14_800 * BILLION
BATCH_RAMP_TOKENS = 469 * BILLION
CONSTANT_LR_TOKENS = 10 * TRILLION  # also where the MTP weight drops
COSINE_LR_TOKENS = 4_300 * BILLION
FINAL_LR_TOKENS = 333 * BILLION
LAST_LR_TOKENS = 167 * BILLION
BIAS_SPEED_TOKENS = 14_300 * BILLION

# 4.2: everything that does not change with time.
SEQUENCE_LENGTH = 4096  # "4K"
INIT_STD = 0.006
BALANCE_ALPHA = 1e-4  # sequence-wise balance loss (equations 17-20); not the 0.001 of some configs
FIM_RATE = 0.1  # 4.1, prefix-suffix-middle


@dataclass(frozen=True)
class AdamWSettings:
    """Section 4.2. eps is unpublished: the field's default."""

    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    eps: float = 1e-8


@dataclass(frozen=True)
class LearningRate:
    """Section 4.2: linear warm-up by steps, then a plateau, a cosine and two steps down by tokens.

    Phases are half open: at exactly `constant_until` tokens the cosine begins. During warm-up the first optimizer
    step (step 0) has rate 0, as published ("from 0 to 2.2e-4").
    """

    peak: float = 2.2e-4
    final: float = 2.2e-5
    last: float = 7.3e-6
    warmup_steps: int = 2000
    constant_until: int = CONSTANT_LR_TOKENS
    cosine_until: int = CONSTANT_LR_TOKENS + COSINE_LR_TOKENS
    final_until: int = CONSTANT_LR_TOKENS + COSINE_LR_TOKENS + FINAL_LR_TOKENS

    def __call__(self, step: int, tokens: int) -> float:
        """The rate of the optimizer step number `step` (from 0), when `tokens` tokens were consumed before it."""
        return self.by_tokens(tokens) * min(1.0, step / self.warmup_steps if self.warmup_steps else 1.0)

    def by_tokens(self, tokens: int) -> float:
        """The rate without warm-up."""
        if tokens < self.constant_until:
            return self.peak
        if tokens < self.cosine_until:
            done = (tokens - self.constant_until) / (self.cosine_until - self.constant_until)
            return cosine(self.peak, self.final, done)
        return self.final if tokens < self.final_until else self.last


@dataclass(frozen=True)
class BatchSize:
    """Section 4.2: sequences per step grow from `start` to `end` over the first `ramp_tokens` tokens, then stay.

    The shape is unpublished: linear in tokens, rounded down to a multiple of `quantum` (so that it divides over
    ranks and micro-batches), starting at `start` exactly.
    """

    start: int = 3072
    end: int = 15360
    ramp_tokens: int = BATCH_RAMP_TOKENS
    quantum: int = 512

    def __call__(self, tokens: int) -> int:
        if tokens >= self.ramp_tokens:
            return self.end
        return (
            self.start + (self.end - self.start) * tokens // (self.ramp_tokens * self.quantum) * self.quantum
        )


@dataclass(frozen=True)
class TwoLevels:
    """A value that changes once: `before` until `switch` tokens were consumed, `after` from then on."""

    before: float
    after: float
    switch: int

    def __call__(self, tokens: int) -> float:
        return self.before if tokens < self.switch else self.after


@dataclass(frozen=True)
class Pretraining:
    """The schedules of pre-training, section 4.2. `REPORT` is the published run; `scaled` makes a small one."""

    total_tokens: int = TOTAL_TOKENS
    sequence_length: int = SEQUENCE_LENGTH
    learning_rate: LearningRate = LearningRate()
    batch_size: BatchSize = BatchSize()
    bias_speed: TwoLevels = TwoLevels(0.001, 0.0, BIAS_SPEED_TOKENS)  # gamma of auxiliary-loss-free balancing
    mtp_weight: TwoLevels = TwoLevels(0.3, 0.1, CONSTANT_LR_TOKENS)  # lambda of multi-token prediction
    balance_alpha: float = BALANCE_ALPHA
    optimizer: AdamWSettings = AdamWSettings()

    def scaled(
        self,
        total_tokens: int,
        *,
        sequence_length: int,
        start_batch: int,
        end_batch: int,
        warmup_fraction: float = 0.01,
        peak_lr: float | None = None,
        bias_speed: float | None = None,
        batch_quantum: int = 1,
    ) -> Pretraining:
        """The same shape on `total_tokens` tokens: each milestone keeps its fraction of the run.

        sequence_length:       tokens per sequence of the small run.
        start_batch, end_batch: sequences per step before and after the ramp, multiples of `batch_quantum`.
        warmup_fraction:       warm-up's share of the steps. The report's own share is 0.2 % of the tokens, too
                               few steps for a run of some hundred.
        peak_lr:               the plateau; the two lower rates keep their ratio to it.
        bias_speed:            gamma before it is frozen. Small runs need more than 0.001: the bias moves by gamma
                               per step, and 300 steps of 0.001 cannot reorder scores that differ by more than 0.3.
        """
        whole = self.total_tokens
        ratio = 1.0 if peak_lr is None else peak_lr / self.learning_rate.peak
        batch = BatchSize(
            start_batch, end_batch, _scale(self.batch_size.ramp_tokens, total_tokens, whole), batch_quantum
        )
        rate = self.learning_rate
        result = dataclasses.replace(
            self,
            total_tokens=total_tokens,
            sequence_length=sequence_length,
            batch_size=batch,
            learning_rate=LearningRate(
                peak=rate.peak if peak_lr is None else peak_lr,
                final=rate.final * ratio,
                last=rate.last * ratio,
                constant_until=_scale(rate.constant_until, total_tokens, whole),
                cosine_until=_scale(rate.cosine_until, total_tokens, whole),
                final_until=_scale(rate.final_until, total_tokens, whole),
            ),
            bias_speed=TwoLevels(
                self.bias_speed.before if bias_speed is None else bias_speed,
                self.bias_speed.after,
                _scale(self.bias_speed.switch, total_tokens, whole),
            ),
            mtp_weight=dataclasses.replace(
                self.mtp_weight, switch=_scale(self.mtp_weight.switch, total_tokens, whole)
            ),
        )
        warmup = max(1, round(result.count_steps() * warmup_fraction))
        return dataclasses.replace(
            result, learning_rate=dataclasses.replace(result.learning_rate, warmup_steps=warmup)
        )

    def count_steps(self) -> int:
        """Optimizer steps of the whole run; the last one may pass the end by less than a batch."""
        steps = tokens = 0
        while tokens < min(self.total_tokens, self.batch_size.ramp_tokens):
            tokens += self.batch_size(tokens) * self.sequence_length
            steps += 1
        rest = max(0, self.total_tokens - tokens)
        return steps + math.ceil(rest / (self.batch_size.end * self.sequence_length))


REPORT = Pretraining()


@dataclass(frozen=True)
class ContextPhase:
    """One phase of YaRN context extension, section 4.3: constant rate, fixed number of steps."""

    sequence_length: int
    batch_size: int
    steps: int = 1000
    learning_rate: float = LearningRate.last

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.batch_size * self.steps


CONTEXT_PHASES = (ContextPhase(32 * 1024, 1920), ContextPhase(128 * 1024, 480))


@dataclass(frozen=True)
class SftSchedule:
    """Section 5.1: two epochs, cosine from `peak` to `final` over all steps; no warm-up is published."""

    peak: float = 5e-6
    final: float = 1e-6
    epochs: int = 2

    def __call__(self, step: int, total_steps: int) -> float:
        """The rate of step `step` (from 0); the last step, `total_steps - 1`, has exactly `final`."""
        return cosine(self.peak, self.final, min(1.0, step / max(1, total_steps - 1)))


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine from `start` (done = 0) to `end` (done = 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def _scale(tokens: int, total: int, whole: int) -> int:
    """`tokens` of a run of `whole` tokens, on a run of `total`, in exact integers."""
    return (tokens * total + whole // 2) // whole
