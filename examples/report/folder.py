"""What the page reads of a run folder: the results and metrics of the stages that have finished."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from examples.stages.record import read_begun, read_done
from examples.train.metrics import read_metrics

Rows = list[dict[str, Any]]


class RunFolder:
    """done: the record of every finished stage among `stages`, in their order; results: what each returned."""

    def __init__(self, root: Path, stages: tuple[str, ...]) -> None:
        self.root = root
        found = {stage: read_done(root, stage) for stage in stages}
        self.done = {stage: record for stage, record in found.items() if record}
        self.results: dict[str, Any] = {stage: record["result"] for stage, record in self.done.items()}
        self._metrics: dict[str, Rows] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        return json.loads((self.root / "config.json").read_text())

    def begun(self, stage: str) -> dict[str, Any]:
        """stage.json; empty if an older version made the stage."""
        return read_begun(self.root, stage) or {}

    def steps(self, stage: str) -> Rows:
        """The metrics of every step of training."""
        return [row for row in self._read(stage) if "lr" in row]

    def held_out(self, stage: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The evaluations on the way: (line of metrics, what was measured)."""
        return [(row, row["held_out"]) for row in self._read(stage) if "held_out" in row]

    def _read(self, stage: str) -> Rows:
        if stage not in self._metrics:
            path = self.root / stage / "metrics.jsonl"
            self._metrics[stage] = read_metrics(path) if stage in self.done and path.exists() else []
        return self._metrics[stage]
