"""Supervised fine-tuning by both on the same samples, and how trl's trainer is given our rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch

from bench.beside_trl.turns import Start, Turns, adamw_arguments, common_arguments
from examples.data.chat_pack import ChatRows
from examples.errors import UserError
from examples.stages.sft import SftTrainer

Form = Literal["packed", "padded"]


def packed_rows(rows: ChatRows, steps: int) -> list[dict[str, list[int]]]:
    """Our rows of the first steps as trl's packed data set has them: tokens, labels (-100: not learnt), lengths of samples.

    Without the padding behind the last sample, which trl's packing does not have either.
    """
    found = []
    for step in range(steps):
        (batch,) = rows.batches(step)
        labels = torch.where(batch.loss_mask, batch.tokens[:, 1:], -100).tolist()
        for tokens, wanted, positions in zip(batch.tokens.tolist(), labels, batch.positions, strict=True):
            end = tokens.index(rows.pad) if rows.pad in tokens else len(tokens)
            cuts = [at for at in (positions == 0).nonzero()[:, 0].tolist() if at < end] + [end]
            found.append(
                {
                    "input_ids": tokens[:end],
                    "labels": [-100, *wanted][:end],
                    "seq_lengths": [b - a for a, b in itertools.pairwise(cuts)],
                }
            )
    return found


def padded_steps(packed: Sequence[dict[str, list[int]]], per_step: int) -> list[dict[str, list[list[int]]]]:
    """The same samples one by one: an item holds those of a whole step, as how many there are differs."""
    items = []
    for start in range(0, len(packed), per_step):
        item: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row in packed[start : start + per_step]:
            for begin, end in itertools.pairwise(itertools.accumulate(row["seq_lengths"], initial=0)):
                item["input_ids"].append(row["input_ids"][begin:end])
                item["labels"].append(row["labels"][begin:end])
        items.append(item)
    return items


def sft(start: Start, form: Form, steps: int) -> dict[str, Any]:
    """Both trainers on the same samples; trl's in its `form`, "packed" or "padded"."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    config, tokenizer = start.config, start.tokenizer
    ours = SftTrainer(config, start.folder / "none", start.weights, tokenizer, start.chats, {})
    if steps >= ours.rows.steps_per_epoch:
        raise UserError(f"steps: must be below {ours.rows.steps_per_epoch}, one epoch; got {steps}")
    ours.total_steps = steps + 1  # transformers' cosine would end one step later than ours
    rows = packed_rows(ours.rows, steps)
    batch = config.sft.batch_size
    collator = None
    if form == "padded":
        inner = DataCollatorForLanguageModeling(tokenizer.pad_id)

        def collator(items: list[dict[str, Any]]) -> dict[str, Any]:
            (item,) = items
            pairs = zip(item["input_ids"], item["labels"], strict=True)
            return inner([{"input_ids": tokens, "labels": labels} for tokens, labels in pairs])

    arguments = SFTConfig(
        **common_arguments(start, steps),
        **adamw_arguments(config.sft.optimizer),
        per_device_train_batch_size=1 if collator else batch,
        train_sampling_strategy="sequential",
        learning_rate=config.sft.schedule.peak,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.sft.schedule.final},
        packing=collator is None,
        max_length=ours.rows.seq_len + 1,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )
    turns = Turns(start.threads)
    theirs = SFTTrainer(
        str(start.folder / "hf"),
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list(padded_steps(rows, batch) if collator else rows),
        processing_class=AutoTokenizer.from_pretrained(start.folder / "hf"),
        callbacks=[turns.callback(ours.train_step)],
    )
    turns.run(theirs)
    real = [sum(len(row["input_ids"]) for row in rows[i : i + batch]) for i in range(0, len(rows), batch)]
    turns.tokens = {"ours": real, "trl": real}
    gaps = [abs(a - b) for a, b in zip(turns.losses["ours"], turns.losses["trl"], strict=True)]
    rates = [abs(a - b) / b for a, b in zip(turns.rates["ours"], turns.rates["trl"], strict=True)]
    if max(rates) > 1e-6:
        raise UserError(f"rates: must be equal on both sides; got {turns.rates}")
    return turns.summary() | {"loss_gap": max(gaps), "losses": turns.losses}
