"""The model-based reward (report section 5.2.1): a judge, fine-tuned from the SFT checkpoint on preferences with a rationale.

The report publishes the idea (from SFT, "the final reward" and "the chain-of-thought leading to the reward") and no number, so the
rates are those of its fine-tuning (5.1) unless a configuration says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from examples.configs.schedules import SftSchedule
from examples.errors import UserError

# Unpublished too; it asks for what the pairs of `examples.rewards.pairs` are about.
JUDGE_SYSTEM = (
    "You compare two responses to a question. First explain which is better and why, by correctness, then clarity, then "
    "brevity. Then write a last line: Verdict: 1 or Verdict: 2."
)


@dataclass(frozen=True)
class RewardConfig:
    """A trained judge and its measurement.

    start: the stage whose weights it begins with, and whose answers `policy` judges. system: what the judge is told.
    schedule, batch_size, micro_batch: as in `sft`, whose other settings hold here too. sources, counts: kinds of generated pairs
    (`examples.rewards.pairs`) and how many problems of each; user: JSONL files of prompt, chosen, rejected, rationale, of whose
    prompts one in `held_out_every` is for evaluation. held_out: pairs of each generated kind to measure on. answers,
    temperature, max_new_tokens: of the policy's answers. max_rationale: tokens before the judge is asked for its verdict.
    votes, vote_temperature, vote_pairs: judgements of each pair when voting is measured (section 5.4.2), their temperature,
    and how many held-out pairs of each kind; 0 pairs: not measured. eval_every, checkpoint_every: steps, 0 for only at the end.
    """

    start: str = "sft"
    system: str = JUDGE_SYSTEM
    schedule: SftSchedule = field(default_factory=SftSchedule)
    batch_size: int = 64
    micro_batch: int = 0
    sources: tuple[str, ...] = ("sums", "size", "policy", "brevity")
    counts: tuple[int, ...] = (10000, 10000, 10000, 10000)
    user: tuple[str, ...] = ()
    held_out: int = 256
    held_out_every: int = 20
    answers: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 1024
    max_rationale: int = 128
    votes: int = 6
    vote_temperature: float = 1.0
    vote_pairs: int = 256
    eval_every: int = 0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {
            "batch_size": 1, "micro_batch": 0, "held_out": 1, "held_out_every": 2, "answers": 2, "max_new_tokens": 1,
            "max_rationale": 1, "votes": 2, "vote_pairs": 0, "eval_every": 0, "checkpoint_every": 0, "seed": 0,
        }.items():  # fmt: skip
            if getattr(self, name) < low:
                raise UserError(f"reward.{name}: must be at least {low}; got {getattr(self, name)}")
        for name in ("temperature", "vote_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"reward.{name}: must be positive; got {getattr(self, name)}")
        if self.votes % 2:
            raise UserError(f"reward.votes: must be even, half of them in each order; got {self.votes}")
        if len(self.sources) != len(self.counts) or min(self.counts, default=1) < 1:
            raise UserError(
                f"reward.counts: must be one of 1 or more for each of {len(self.sources)} sources; got {self.counts}"
            )
        if not self.sources and not self.user:
            raise UserError(
                "reward.sources, reward.user: hold no preference; give at least one source or file"
            )

    def quick(self) -> RewardConfig:
        """Only the kinds that are learnt first, measured on fewer pairs: with less of everything nothing would be learnt."""
        few = {"size": 8, "brevity": 1}  # of whose pairs one in so many is kept
        counts = {
            name: max(1, n // few[name])
            for name, n in zip(self.sources, self.counts, strict=True)
            if name in few
        } or dict(zip(self.sources, self.counts, strict=True))
        return replace(
            self,
            sources=tuple(counts),
            counts=tuple(counts.values()),
            held_out=max(1, self.held_out // 3),
            vote_pairs=self.vote_pairs // 4,
        )
