"""Two trainers step by step in turns: trl's runs its own loop, and a callback lets ours step after each of its steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.configs import RunConfig
from examples.configs.schedules import AdamWSettings
from examples.data.chat_sources import Messages
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.train.runner import Weights

INSTALL = "pip install 'trl==1.16.0'"  # an optional package, requirements/optional.txt


@dataclass(frozen=True)
class Start:
    """What both begin with. folder: scratch; under `hf` the same weights and tokenizer as transformers reads them."""

    config: RunConfig
    folder: Path
    weights: Weights
    tokenizer: Tokenizer
    chats: dict[str, list[Messages]]
    threads: int = 1


def need_trl() -> None:
    """`UserError` with what to install, if it is missing."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"trl: must be installed ({INSTALL}); got {error}") from None


WARM_UP = 2  # steps: memory of the allocator's and of the optimizer is touched for the first time


class Turns:
    """Times, losses and rates of both sides, step by step. The first `WARM_UP` steps are not in the speed."""

    def __init__(self, threads: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.times: dict[str, list[float]] = {"ours": [], "trl": []}
        self.tokens: dict[str, list[int]] = {"ours": [], "trl": []}
        self.losses: dict[str, list[float]] = {"ours": [], "trl": []}
        self.rates: dict[str, list[float]] = {"ours": [], "trl": []}

    def callback(self, ours: Callable[[], dict[str, Any]]) -> Any:
        """For trl's trainer: after each of its steps, ours takes one."""
        from transformers import TrainerCallback

        turns = self

        class TakeTurns(TrainerCallback):
            start = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.start = turns.clock()

            def on_pre_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
                turns.rates["trl"].append(optimizer.param_groups[0]["lr"])

            def on_step_end(self, *_: Any, **__: Any) -> None:
                middle = turns.clock()
                metrics = ours()
                turns.times["trl"].append(middle - self.start)
                turns.times["ours"].append(turns.clock() - middle)
                turns.rates["ours"].append(metrics["lr"])
                turns.losses["ours"].append(metrics.get("loss", float("nan")))
                self.start = turns.clock()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    turns.losses["trl"].append(logs["loss"])

        return TakeTurns()

    def run(self, trainer: Any) -> None:
        """trl's loop to its end, without a line for each step."""
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def summary(self) -> dict[str, Any]:
        """Tokens per second, medians of the turns, and how many times trl's ours are in each turn."""
        rate = {
            name: [n / t for n, t in zip(self.tokens[name], times, strict=True)][WARM_UP:]
            for name, times in self.times.items()
        }
        ratios = [a / b for a, b in zip(rate["ours"], rate["trl"], strict=True)]
        return {
            "ours_tokens_per_s": statistics.median(rate["ours"]),
            "trl_tokens_per_s": statistics.median(rate["trl"]),
            "ratio": statistics.median(ratios),
            "ratio_worst_turn": min(ratios),
            "turns": len(ratios),
            "ratios": ratios,
        }


def common_arguments(start: Start, steps: int) -> dict[str, Any]:
    """What both of trl's trainers get. Everything else is their default."""
    return {
        "output_dir": str(start.folder / "trl"),
        "max_steps": steps,
        "use_cpu": True,
        "bf16": start.config.model.precision == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def adamw_arguments(settings: AdamWSettings) -> dict[str, Any]:
    """Our optimizer's settings in transformers' names."""
    return {
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
    }
