"""Post-training (report section 5): supervised fine-tuning, GRPO, distillation. Defaults are the report's where it says one.

The report gives SFT's rates, epochs and masking (5.1), and GRPO's objective (5.2.2), but neither GRPO's numbers nor any batch
size. Where it is silent the defaults are those of the paper that it cites for GRPO, DeepSeekMath (arXiv 2402.03300, section
4.2): rate 1e-6, KL coefficient 0.04, 64 outputs a question, 1024 tokens, one update. R1 (arXiv 2501.12948) has others: rate
3e-6, 0.001, 16 outputs, clip 10, 16 minibatches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from examples.configs.schedules import BALANCE_ALPHA, AdamWSettings, SftSchedule, cosine
from examples.errors import UserError
from examples.rewards.style import StyleLimits

# In post-training the routing bias stands still, as in the last 500B tokens of pre-training (section 4.2); some RL
# frameworks leave it at 0.001, which changes the policy between two updates of its weights.
FROZEN_BIAS = 0.0
LAST_MTP_WEIGHT = 0.1  # section 4.2, the last 4.8T tokens; the report says nothing about MTP in fine-tuning

# Section 5.1 describes a system prompt that leads the expert to reflect and to verify; its text is unpublished.
REFLECTION = "Think step by step and check your result."


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (section 5.1).

    start: the stage whose weights it begins with. schedule: rates and epochs. seq_len: tokens fed per row (0: data.seq_len).
    batch_size: rows per step (unpublished); micro_batch: rows per pass, 0 for all. mtp_weight: MTP keeps training, or its
    drafts would be rejected in chats. bias_speed, balance_alpha: of the experts' balance. sources, counts: conversations
    (`examples.data.chat_sources`); user: JSONL files. held_out_every: one conversation in so many is for evaluation.
    """

    start: str = "extend"
    schedule: SftSchedule = field(default_factory=SftSchedule)
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    seq_len: int = 0
    batch_size: int = 64
    micro_batch: int = 0
    mtp_weight: float = LAST_MTP_WEIGHT
    bias_speed: float = FROZEN_BIAS
    balance_alpha: float = BALANCE_ALPHA
    sources: tuple[str, ...] = ("sums", "sorting", "worked", "translation", "dialogue")
    counts: tuple[int, ...] = (2000, 2000, 2000, 10000, 10000)
    user: tuple[str, ...] = ()
    held_out_every: int = 20
    eval_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("sft", self, 0, "seq_len micro_batch mtp_weight bias_speed balance_alpha eval_every")
        _at_least("sft", self, 0, "checkpoint_every seed")
        _at_least("sft", self, 1, "batch_size")
        _at_least("sft", self, 2, "held_out_every")
        if self.schedule.epochs < 1:
            raise UserError(f"sft.schedule.epochs: must be at least 1; got {self.schedule.epochs}")
        if len(self.sources) != len(self.counts):
            raise UserError(
                f"sft.counts: must be one for each of {len(self.sources)} sources; got {self.counts}"
            )


@dataclass(frozen=True)
class GrpoConfig:
    """Group Relative Policy Optimization (section 5.2.2, equations 26-28); numbers unpublished, see the module.

    task: what is solved, a name of `examples.stages.tasks.TASKS`; problems: the user's instead, JSONL files with question and
    answer, judged by the maths rule. rules, rule_weights: what the reward adds to being right
    (`examples.stages.tasks.FORMS`), and how much of each; judge: weight of the model-based reward. gate: a wrong answer is
    worth nothing, whatever its form. longest_words: what the rule `length` allows. start: the stage whose weights are the
    first policy and the reference. steps: rollout batches. prompts: questions a step; group: G, outputs of each. updates:
    passes over a rollout batch; minibatches: optimizer steps in each pass. learning_rate: reached after `warmup` steps; from
    there half a cosine leads to `final_rate` (none: it stays). clip_low, clip_high: the ratio stays in [1 - low, 1 + high].
    beta: of the KL term; where it is 0, `kl_every` says after how many steps the divergence is measured (0: never).
    normalization: how token terms become a loss, see `examples.train.grpo.NORMALIZATIONS`.
    reference_every: steps after which the policy becomes the reference, 0: never. temperature, max_new_tokens: of the
    rollout. replay: train with the experts that the rollout chose. eval_prompts: held-out problems for greedy accuracy.
    """

    task: str = "sums"
    problems: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    rule_weights: tuple[float, ...] = ()
    judge: float = 0.0
    gate: bool = True
    longest_words: int = 500
    start: str = "sft"
    steps: int = 500
    prompts: int = 16
    group: int = 64
    updates: int = 1
    minibatches: int = 1
    learning_rate: float = 1e-6
    final_rate: float | None = None
    warmup: int = 0
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl_every: int = 0
    normalization: Literal["grpo", "grpo_printed", "dapo", "dr_grpo"] = "grpo"
    reference_every: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 1024
    replay: bool = True
    micro_batch: int = 0
    eval_prompts: int = 256
    eval_every: int = 50
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("grpo", self, 1, "steps prompts updates minibatches max_new_tokens eval_prompts")
        _at_least("grpo", self, 2, "group")
        if len(self.rules) != len(self.rule_weights):
            raise UserError(
                f"grpo.rule_weights: must be one for each of {len(self.rules)} rules; got {self.rule_weights}"
            )
        _at_least("grpo", self, 0, "warmup micro_batch eval_every checkpoint_every reference_every beta seed")
        _at_least("grpo", self, 0, "judge longest_words kl_every")
        for name in ("learning_rate", "temperature", "clip_low", "clip_high"):
            if getattr(self, name) <= 0:
                raise UserError(f"grpo.{name}: must be positive; got {getattr(self, name)}")
        if self.final_rate is not None and not 0 <= self.final_rate <= self.learning_rate:
            raise UserError(
                f"grpo.final_rate: must be between 0 and grpo.learning_rate = {self.learning_rate}; got {self.final_rate}"
            )
        if self.prompts % self.minibatches:
            raise UserError(
                f"grpo.minibatches: must divide grpo.prompts = {self.prompts}; got {self.minibatches}"
            )

    @property
    def judged_by(self) -> str:
        """The stage whose model judges answers, if `judge` asks for one."""
        return "reward" if self.judge else ""

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        if self.final_rate is None:
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return cosine(self.learning_rate, self.final_rate, done)


@dataclass(frozen=True)
class DistillConfig:
    """Distillation from an expert (section 5.1), then the final fine-tuning with `sft`'s settings.

    teacher: the stage of the domain expert; student: the stage whose weights are fine-tuned. system: the prompt that the
    teacher, and then the student in half of the samples, sees. problems, samples: answers are drawn to so many problems, so
    many to each; temperature: of the draws ("high", unpublished). style: what an answer may be. keep: good answers of a
    problem that are kept, shortest first; max_new_tokens: an answer that is not complete by then is rejected.
    """

    teacher: str = "grpo"
    student: str = "sft"
    system: str = REFLECTION
    problems: int = 10000
    samples: int = 16
    temperature: float = 1.0
    style: StyleLimits = field(default_factory=lambda: StyleLimits(boxed=False))
    keep: int = 1
    max_new_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("distill", self, 1, "problems samples keep max_new_tokens")
        _at_least("distill", self, 0, "seed")
        if self.temperature <= 0:
            raise UserError(f"distill.temperature: must be positive; got {self.temperature}")


def _at_least(section: str, config: object, low: float, names: str) -> None:
    for name in names.split():
        if getattr(config, name) < low:
            raise UserError(f"{section}.{name}: must be at least {low}; got {getattr(config, name)}")
