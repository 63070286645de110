"""Context extension (report section 4.3): YaRN on the decoupled key and its queries, two phases of training on longer rows.

Pre-training comes first and with plain RoPE; then YaRN is switched on once, with the same s in both phases, and the second
phase continues from the first: one run of steps, whose rows become longer on the way. The weights that it leaves carry YaRN in
their configuration, so fine-tuning, generation and export follow without being told.

The result is loss by position (`examples.evals.positions`) of four models, out to the length of the second phase: `plain`, the
start with plain RoPE beyond its length; `untrained`, with YaRN and no training; `phase_1`, `phase_2`. And the needle grid before and
after. `shown` says whether the extended model is flat and the plain one is not; a model that was trained too little to use positions
(`--quick`) has nothing to lose beyond its length, and says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.configs import RunConfig, to_dict
from examples.data.long_rows import LongRows
from examples.data.shards import ShardReader
from examples.data.shuffle import RowShuffle
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.evals import needle
from examples.evals.positions import Blocks, block_losses, by_position, find_blocks
from examples.evals.statistics import Score, share
from examples.model.transformer import Transformer
from examples.stages.stage import Context, write_json
from examples.stages.tokenize import open_data
from examples.train.loop import check_tokenizer, micro_batches, mixture_weights
from examples.train.metrics import read_metrics
from examples.train.optim import MOMENTS
from examples.train.runner import PostTrainer, Weights, start_weights

BINS = 4  # of the curve, in each block of the trained length
MARGIN = 0.05  # nats: a rise from the first block of positions to the last that still counts as flat
ANSWER_ROOM = 8  # tokens of a needle's context that are left for the answer


def run(context: Context) -> dict[str, Any]:
    """Extend the weights of stage `extend.start`."""
    config = context.config.extend
    tokenizer, train, val = open_data(context.root)
    check_tokenizer(context.config, tokenizer.vocab_size)
    weights = start_weights(context.root / config.start)
    trained = context.config.data.seq_len
    extended = with_yarn(weights, context.config)
    blocks = find_blocks(val, trained, config.second.sequence_length // trained, config.eval_blocks)
    trainer = ExtendTrainer(context.config, context.folder, extended, train, blocks)
    _say_plan(trainer)
    haystack = Haystack(context.config, tokenizer, val)
    before = context.folder / "before.json"
    if not before.exists():
        plain = replace(weights, config=replace(weights.config, max_positions=config.longest)).build()
        write_json(before, {"positions": trainer.positions(plain), "needle": haystack.search(plain)})
    start = json.loads(before.read_text())
    trainer.run()
    stages = [r["held_out"] for r in read_metrics(context.folder / "metrics.jsonl") if "held_out" in r]
    positions = {"plain": start["positions"], "untrained": stages[0]}
    positions |= {f"phase_{number}": found for number, found in enumerate(stages[1:], 1)}
    flat = {name: found["rise"] <= MARGIN for name, found in positions.items()}
    result = {
        "start": config.start,
        "trained_length": trained,
        "final_length": config.second.sequence_length,
        "yarn": asdict(config.yarn),
        "phases": _phases(trainer, context.folder),
        "positions": positions,
        "bin_width": trained // BINS,
        "blocks": len(blocks.sources),
        "margin": MARGIN,
        "flat": flat,
        "shown": flat["phase_2"] and not flat["plain"],
        "needle": {
            "filler": haystack.source,
            "before": start["needle"],
            "after": haystack.search(trainer.model),
        },
    }
    _say_result(result)
    return result


def with_yarn(weights: Weights, config: RunConfig) -> Weights:
    """The same weights as a model with YaRN, after every check of lengths."""
    extend = config.extend
    extend.check(config.data.seq_len)
    if config.data.seq_len % BINS:
        raise UserError(
            f"data.seq_len: must be a multiple of {BINS} to draw loss by position; got {config.data.seq_len}"
        )
    if weights.config.yarn is not None:
        raise UserError(
            f"extend.start: must be a stage that was trained without YaRN; got {extend.start!r} with factor "
            f"{weights.config.yarn.factor:g}"
        )
    return replace(weights, config=replace(weights.config, yarn=extend.yarn, max_positions=extend.longest))


class ExtendTrainer(PostTrainer):
    """Both phases as one run of steps; see `PostTrainer`. An evaluation follows each phase."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        weights: Weights,
        train: Mapping[str, ShardReader],
        blocks: Blocks,
    ) -> None:
        self.settings = extend = config.extend
        self.blocks = blocks
        data, shares = config.data, mixture_weights(config, train)
        self.rows = []
        for number, phase in enumerate(extend.phases):
            rows = LongRows(
                train,
                shares,
                phase.sequence_length,
                seed=extend.seed + number,
                mask_documents=data.document_mask,
            )
            self.rows.append(RowShuffle(rows, data.shuffle_rows, seed=extend.seed))
        super().__init__(
            folder,
            weights,
            to_dict(config) | {"model": asdict(weights.config)},
            optimizer=extend.optimizer,
            moments=MOMENTS[config.train.moments],
            total_steps=sum(phase.steps for phase in extend.phases),
            eval_every=0,
            checkpoint_every=extend.checkpoint_every,
            seed=extend.seed,
        )
        self.resume()

    @property
    def phase(self) -> int:
        """0 or 1: of the next step."""
        return int(self.step >= self.settings.first.steps)

    def extra_meta(self) -> dict[str, Any]:
        """Where the rows of this phase are."""
        return {"rows": self.rows[self.phase].state_dict()}

    def load_extra_meta(self, meta: dict[str, Any]) -> None:
        """Continue the rows."""
        self.rows[self.phase].load_state_dict(meta["rows"])

    def evaluation_due(self) -> bool:
        """At the end of a phase."""
        return self.step == self.settings.first.steps

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        start, extend = time.perf_counter(), self.settings
        phase, rows = extend.phases[self.phase], self.rows[self.phase]
        self.model.train()
        device = self.model.embed.weight.device
        batches = [rows.next_batch(n).to(device) for n in micro_batches(phase.batch_size, extend.micro_batch)]
        losses = self.backward_next_tokens(batches, extend.mtp_weight, extend.balance_alpha)
        norm = self.update(phase.learning_rate, extend.bias_speed)
        tokens = phase.batch_size * phase.sequence_length
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        return {
            **losses,
            "sequence_length": phase.sequence_length,
            "lr": phase.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def evaluate(self) -> dict[str, Any]:
        """Loss by position."""
        return self.positions(self.model)

    def positions(self, model: Transformer) -> dict[str, Any]:
        """The same of any model."""
        losses = block_losses(model, self.blocks)
        return by_position(losses, self.blocks.length, self.blocks.sources, self.blocks.length // BINS)


class Haystack:
    """Held-out text of one source, the one with most of it, to hide needles in; prompts and answers fill the trained length and
    those of the phases."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, val: Mapping[str, ShardReader]) -> None:
        extend, self.tokenizer = config.extend, tokenizer
        wanted = [config.data.seq_len, *(phase.sequence_length for phase in extend.phases)]
        self.needles = needle.make_needles(extend.needles, extend.seed)
        self.source = max(val, key=lambda name: val[name].tokens)
        reader = val[self.source]
        self.filler: list[int] = []
        for number in range(len(reader)):
            if len(self.filler) >= extend.needles * max(wanted):
                break
            self.filler += reader.document(number).tolist()
        own = max(len(tokenizer.encode(n.fact) + tokenizer.encode(n.question)) for n in self.needles) + 1
        self.lengths = [
            length - ANSWER_ROOM for length in wanted if own <= length - ANSWER_ROOM <= len(self.filler)
        ]

    def search(self, model: Transformer) -> dict[str, Any] | None:
        """The grid, and its score over all cells; None if no length has room for a needle."""
        if not self.lengths:
            return None
        was_training = model.training
        grid = needle.evaluate(model, self.tokenizer, self.filler, self.lengths, needles=self.needles)
        model.train(was_training)
        count = len(grid.lengths) * len(grid.depths) * grid.trials
        found = round(sum(map(sum, grid.accuracy)) * grid.trials)
        score = share("needle", found, count, needle.CHANCE)
        return grid.to_dict() | {"score": score.to_dict()}


def _phases(trainer: ExtendTrainer, folder: Path) -> list[dict[str, Any]]:
    """Each phase with the training loss of its first and last step."""
    losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    found, at = [], 0
    for phase in trainer.settings.phases:
        own, at = losses[at : at + phase.steps], at + phase.steps
        found.append(asdict(phase) | {"tokens": phase.tokens, "loss": [own[0], own[-1]]})
    return found


def _say_plan(trainer: ExtendTrainer) -> None:
    yarn = trainer.settings.yarn
    phases = ", then ".join(
        f"{p.steps} steps of {p.batch_size} x {p.sequence_length}" for p in trainer.settings.phases
    )
    print(
        f"  YaRN with s = {yarn.factor:g} after {yarn.original_max} trained positions: {phases}", flush=True
    )


def _say_result(result: dict[str, Any]) -> None:
    length, final = result["trained_length"], result["final_length"]
    print(
        f"  loss of {result['blocks']} blocks at positions below {length}, and the same blocks up to {final}:"
    )
    for name, found in result["positions"].items():
        print(
            f"  {name:10} {found['first']:8.4f}{found['last']:8.4f}  rise {found['rise']:+.4f} +- "
            f"{found['standard_error'] or 0:.4f}  {'flat' if result['flat'][name] else 'NOT flat'}"
        )
    if result["flat"]["plain"]:
        print(
            "  plain RoPE is flat too: this model has hardly learnt from positions, and the run shows nothing of YaRN"
        )
    for when in ("before", "after"):
        grid = result["needle"][when]
        if grid:
            print(
                f"  needles {when}: {Score(**{k: v for k, v in grid['score'].items() if k != 'near_chance'})}"
            )
    print(end="", flush=True)
