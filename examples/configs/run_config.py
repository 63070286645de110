"""What a run is made of: the model, the data, and the training recipe, as frozen dataclasses without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from examples.configs.benchmarks import BenchmarksConfig
from examples.configs.extension import ExtendConfig
from examples.configs.post_training import DistillConfig, GrpoConfig, SftConfig
from examples.configs.reward import RewardConfig
from examples.configs.schedules import REPORT, Pretraining
from examples.errors import UserError
from examples.model.config import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Data of pre-training (report section 4.1).

    sources: names of corpora, empty for all that are installed; user: files or folders of your own text. max_bytes: of
    each source at most. weights: share of tokens per source, in the order of `sources`; none: in proportion to size.
    vocab_size: entries of the tokenizer to train (none: the model's vocab_size). seq_len: tokens fed per row. fim_rate: share of documents turned into prefix-suffix-middle. split_share: share of
    punctuation + line break tokens that are split. document_mask: hide documents of a row from each other (the report
    does so in fine-tuning only). shuffle_rows: rows shuffled among themselves, for small batches (`examples.data.shuffle`).
    held_out_every: one document in so many is for evaluation. seed: of order and draws.
    """

    sources: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    max_bytes: int | None = None
    weights: tuple[float, ...] | None = None
    vocab_size: int | None = None
    seq_len: int = 4096
    fim_rate: float = 0.1
    split_share: float = 0.1
    document_mask: bool = False
    shuffle_rows: int = 1
    held_out_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise UserError(f"data.seq_len: must be at least 2; got {self.seq_len}")
        for name in ("fim_rate", "split_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name}: must be between 0 and 1; got {getattr(self, name)}")
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise UserError(
                f"data.weights: must be one for each of {len(self.sources)} sources; got {self.weights}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How to train (report section 4.2); every number that changes with time is in `schedule`, see `Pretraining`.

    micro_batch: rows per forward pass, 0: all at once. moments: type in which AdamW keeps its moments (section 3.3.3:
    bf16). ema_decay: of the copy on the CPU (not in the report). guard: what a loss spike does. stop_tokens: end early,
    on the same schedule; 0: at its end. twin_share: part of the run that the twin without the
    routing bias repeats (`examples.stages.pretrain`).
    eval_every, checkpoint_every: steps, 0 for never. seed: of the weights.
    """

    schedule: Pretraining = REPORT
    micro_batch: int = 0
    moments: Literal["bf16", "fp32"] = "bf16"
    ema_decay: float = 0.999
    guard: Literal["warn", "skip", "stop"] = "warn"
    stop_tokens: int = 0
    twin_share: float = 0.5
    eval_every: int = 1000
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("micro_batch", "stop_tokens", "eval_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name}: must not be negative; got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay: must be in [0, 1); got {self.ema_decay}")
        if not 0 < self.twin_share <= 1:
            raise UserError(f"train.twin_share: must be in (0, 1]; got {self.twin_share}")


@dataclass(frozen=True)
class RunConfig:
    """A named run: `python -m examples.run NAME`."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)

    def __post_init__(self) -> None:
        if self.data.seq_len > self.model.max_positions:
            raise UserError(
                f"data.seq_len: must be at most model.max_positions = {self.model.max_positions}; "
                f"got {self.data.seq_len}"
            )
        if self.data.seq_len != self.train.schedule.sequence_length:
            raise UserError(
                f"data.seq_len: must be train.schedule.sequence_length = {self.train.schedule.sequence_length}; "
                f"got {self.data.seq_len}"
            )
