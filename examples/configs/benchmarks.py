"""The final evaluation of every model of a run (report sections 4.4 and 5.3): which models, which tasks, how many items.

The report's own benchmarks are data sets that must be downloaded; `code_problems` and `choice_questions` read them in their public
form. Without them the tasks are made of held-out text and generated maths, and their scores compare the models of one run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from examples.errors import UserError

TASKS = ("text", "cloze", "verified", "arithmetic", "code", "needle")


@dataclass(frozen=True)
class BenchmarksConfig:
    """models: stages whose weights are compared; those that have not run are left out by name. tasks: of `TASKS`.

    documents: held-out documents of each source for bits per byte, at most document_tokens of each. cloze, verified (GRPO's task), arithmetic:
    questions; choice_questions: JSONL of your own instead of cloze questions. code_problems: HumanEval's file (none: six easy
    ones of our own); code_samples: completions of each, code_k: the larger k of pass@k, code_temperature, code_tokens: of them.
    needles: of each cell of a grid of lengths (shares of model.max_positions) and depths. seed: of questions and draws.
    """

    models: tuple[str, ...] = ("pretrain", "extend", "sft", "grpo", "distill")
    tasks: tuple[str, ...] = TASKS
    documents: int = 100
    document_tokens: int = 2048
    cloze: int = 500
    choice_questions: str | None = None
    verified: int = 256
    arithmetic: int = 256
    code_problems: str | None = None
    code_samples: int = 10
    code_k: int = 10
    code_temperature: float = 0.8
    code_tokens: int = 256
    needles: int = 8
    needle_lengths: tuple[float, ...] = (0.25, 0.5, 0.9)
    needle_depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "documents", "document_tokens", "cloze", "verified", "arithmetic", "code_samples", "code_k", "code_tokens",
            "needles", "batch_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"benchmarks.{name}: must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"benchmarks.seed: must be at least 0; got {self.seed}")
        if self.code_k > self.code_samples:
            raise UserError(
                f"benchmarks.code_k: must be at most benchmarks.code_samples = {self.code_samples}; got {self.code_k}"
            )
        if self.code_temperature < 0 or (self.code_temperature == 0 and self.code_samples > 1):
            raise UserError(
                "benchmarks.code_temperature: must be positive, or 0 with benchmarks.code_samples = 1; "
                f"got {self.code_temperature}"
            )
        for name in self.tasks:
            if name not in TASKS:
                raise UserError(f"benchmarks.tasks: must be among {', '.join(TASKS)}; got {name!r}")
        for name in ("models", "tasks", "needle_lengths", "needle_depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"benchmarks.{name}: must hold at least one, and none twice; got {values}")
        if not all(0 < share <= 1 for share in self.needle_lengths):
            raise UserError(f"benchmarks.needle_lengths: must be in (0, 1]; got {self.needle_lengths}")
        if not all(0 <= depth <= 1 for depth in self.needle_depths):
            raise UserError(f"benchmarks.needle_depths: must be in [0, 1]; got {self.needle_depths}")

    def quick(self) -> BenchmarksConfig:
        """A third of the items."""
        fewer = {
            name: max(1, getattr(self, name) // 3)
            for name in ("documents", "cloze", "verified", "arithmetic", "needles")
        }
        return replace(self, **fewer)
