"""Context extension (report section 4.3): YaRN in two phases after pre-training. Defaults are the report's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from examples.configs.post_training import FROZEN_BIAS, LAST_MTP_WEIGHT
from examples.configs.schedules import BALANCE_ALPHA, CONTEXT_PHASES, AdamWSettings, ContextPhase
from examples.errors import UserError
from examples.model.config import YarnConfig


@dataclass(frozen=True)
class ExtendConfig:
    """Two phases of training on longer rows, with one YaRN for both.

    start: the stage whose weights it begins with. yarn: s = 40, alpha = 1, beta = 32, sqrt(t) = 0.1 ln s + 1; its original_max must
    be data.seq_len. first, second: 32K and 128K, 1000 steps each, batches 1920 and 480 (as many tokens a step as pre-training),
    at the last rate of pre-training. Not published: optimizer (as in pre-training; its moments begin at 0), mtp_weight,
    balance_alpha and bias_speed (as at the end of pre-training), data (the mixture of pre-training).
    micro_batch: rows per forward pass, 0: all at once. checkpoint_every: steps, 0: only at the end.
    eval_blocks: blocks of the trained length in each source for loss by position (`examples.evals.positions`).
    needles: in each cell of the needle grid (figure 8). seed: of rows and needles.
    """

    start: str = "pretrain"
    yarn: YarnConfig = field(default_factory=YarnConfig)
    first: ContextPhase = CONTEXT_PHASES[0]
    second: ContextPhase = CONTEXT_PHASES[1]
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    mtp_weight: float = LAST_MTP_WEIGHT
    balance_alpha: float = BALANCE_ALPHA
    bias_speed: float = FROZEN_BIAS
    micro_batch: int = 0
    checkpoint_every: int = 100
    eval_blocks: int = 16
    needles: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mtp_weight", "balance_alpha", "bias_speed", "micro_batch", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"extend.{name}: must not be negative; got {getattr(self, name)}")
        for name in ("eval_blocks", "needles"):
            if getattr(self, name) < 1:
                raise UserError(f"extend.{name}: must be at least 1; got {getattr(self, name)}")
        for name, phase in (("first", self.first), ("second", self.second)):
            for key in ("sequence_length", "batch_size", "steps"):
                if getattr(phase, key) < 1:
                    raise UserError(f"extend.{name}.{key}: must be at least 1; got {getattr(phase, key)}")
            if phase.learning_rate <= 0:
                raise UserError(f"extend.{name}.learning_rate: must be positive; got {phase.learning_rate}")

    @property
    def phases(self) -> tuple[ContextPhase, ContextPhase]:
        """In order."""
        return self.first, self.second

    def check(self, trained: int) -> None:
        """Whether this extends a model that was trained on `trained` tokens a row; `UserError` with the rule if not."""
        first, second = (phase.sequence_length for phase in self.phases)
        if self.yarn.original_max != trained:
            raise UserError(
                f"extend.yarn.original_max: must be data.seq_len = {trained}, the trained length; got {self.yarn.original_max}"
            )
        if first <= trained:
            raise UserError(
                f"extend.first.sequence_length: must be more than data.seq_len = {trained}, the trained length; got {first}"
            )
        if second < first or second % trained:
            raise UserError(
                f"extend.second.sequence_length: must be a multiple of data.seq_len = {trained} and at least "
                f"extend.first.sequence_length = {first}; got {second}"
            )
        if second > self.longest:
            raise UserError(
                f"extend.yarn.factor: must be at least {second / trained:g}, for rows of extend.second.sequence_length = "
                f"{second} after data.seq_len = {trained}; got {self.yarn.factor:g}"
            )

    @property
    def longest(self) -> int:
        """Positions of the extended model: s times the trained length, as in the released weights (163840)."""
        return int(self.yarn.factor * self.yarn.original_max)

    def shorter(self, divisor: int) -> ExtendConfig:
        """The same story on fewer steps and a smaller evaluation."""

        def less(count: int) -> int:
            return max(1, count // divisor)

        return replace(
            self,
            first=replace(self.first, steps=less(self.first.steps)),
            second=replace(self.second, steps=less(self.second.steps)),
            eval_blocks=less(self.eval_blocks),
            needles=less(self.needles),
        )
