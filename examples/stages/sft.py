"""Supervised fine-tuning (report section 5.1): two epochs of conversations, cosine 5e-6 -> 1e-6, packed, masked.

Samples of a row cannot see each other, and only answers are learnt, by the main model and by MTP, which would otherwise draft
ever worse once the model talks in the form of a chat. The routing bias stands still (`sft.bias_speed`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.configs import RunConfig, to_dict
from examples.data.chat import ChatSample, encode_chat, encode_prompt
from examples.data.chat_pack import ChatRows
from examples.data.chat_sources import load_chats
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import generate
from examples.stages.stage import Context, write_json
from examples.stages.tokenize import tokenizer_path
from examples.train.loop import check_tokenizer
from examples.train.optim import MOMENTS
from examples.train.runner import PostTrainer, Weights, start_weights

SHOWN = 2  # held-out questions of each source whose answers are shown
SHOWN_TOKENS = 48


def run(context: Context) -> dict[str, Any]:
    """Fine-tune the weights of stage `sft.start`."""
    config = context.config.sft
    tokenizer = Tokenizer.load(tokenizer_path(context.root))
    check_tokenizer(context.config, tokenizer.vocab_size)
    weights = start_weights(context.root / config.start)
    chats = load_chats(config.sources, config.counts, config.user, seed=config.seed)
    train, held_out = split(chats, config.held_out_every)
    trainer = SftTrainer(context.config, context.folder, weights, tokenizer, train, held_out)
    rows = trainer.rows
    print(
        f"  {len(rows.samples)} conversations ({rows.dropped} too long for a row) in {rows.rows_per_epoch} rows of "
        f"{rows.seq_len} tokens, {trainer.total_steps} steps in {config.schedule.epochs} epochs",
        flush=True,
    )
    before = context.folder / "samples_before.json"
    if not before.exists():
        write_json(before, answers(trainer.model, tokenizer, held_out))
    first, last = trainer.run()
    shown = [
        {**old, "after": new["answer"]}
        for old, new in zip(
            json.loads(before.read_text()), answers(trainer.model, tokenizer, held_out), strict=True
        )
    ]
    print(f"  held-out loss of answers {first['loss']:.4f} -> {last['loss']:.4f} nats/token", flush=True)
    for sample in shown:
        print(f"  [{sample['source']}] {sample['question'][:60]!r}", flush=True)
        print(f"      before {sample['answer'][:70]!r}, after {sample['after'][:70]!r}", flush=True)
    return {
        "steps": trainer.step,
        "samples": {name: len(group) for name, group in train.items()},
        "dropped": rows.dropped,
        "before": first,
        "after": last,
        "answers": shown,
    }


Chats = dict[str, list[list[dict[str, str]]]]


def split(chats: Mapping[str, list[list[dict[str, str]]]], every: int) -> tuple[Chats, Chats]:
    """Conversations to learn from and to evaluate with, by the hash of their text: equal ones fall on the same side.

    Neither side is empty: of few conversations, the one with the smallest hash is held out and the next is learnt.
    """
    digests = {name: [_digest(messages) for messages in group] for name, group in chats.items()}
    smallest = sorted({digest for group in digests.values() for digest in group})[:2]
    if len(smallest) < 2:
        raise UserError(f"sft: there must be at least 2 different conversations; got {len(smallest)}")
    train: Chats = {}
    held_out: Chats = {}
    for name, group in chats.items():
        for messages, digest in zip(group, digests[name], strict=True):
            out = digest == smallest[0] or (digest != smallest[1] and digest % every == 0)
            (held_out if out else train).setdefault(name, []).append(messages)
    return train, held_out


def _digest(messages: list[dict[str, str]]) -> int:
    messages = [
        m for m in messages if m["role"] != "system"
    ]  # with or without it, the same is asked and answered
    return int.from_bytes(hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest(), "little")


class SftTrainer(PostTrainer):
    """One fine-tuning run; see `PostTrainer`."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        weights: Weights,
        tokenizer: Tokenizer,
        train: Mapping[str, Sequence[list[dict[str, str]]]],
        held_out: Mapping[str, Sequence[list[dict[str, str]]]],
    ) -> None:
        self.settings = sft = config.sft
        seq_len = sft.seq_len or config.data.seq_len
        if seq_len > weights.config.max_positions:
            raise UserError(
                f"sft.seq_len: must be at most model.max_positions = {weights.config.max_positions}; got {seq_len}"
            )
        samples = [encode_chat(tokenizer, messages) for group in train.values() for messages in group]
        self.rows = ChatRows(samples, seq_len, sft.batch_size, pad=tokenizer.pad_id, seed=sft.seed)
        self.held_out = {
            name: [encode_chat(tokenizer, messages) for messages in group] for name, group in held_out.items()
        }
        super().__init__(
            folder,
            weights,
            to_dict(config) | {"model": asdict(weights.config)},
            optimizer=sft.optimizer,
            moments=MOMENTS[config.train.moments],
            total_steps=self.rows.steps_per_epoch * sft.schedule.epochs,
            eval_every=sft.eval_every,
            checkpoint_every=sft.checkpoint_every,
            seed=sft.seed,
        )
        self.resume()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        start, sft = time.perf_counter(), self.settings
        lr = sft.schedule(self.step, self.total_steps)
        self.model.train()
        device = self.model.embed.weight.device
        batches = [batch.to(device) for batch in self.rows.batches(self.step, sft.micro_batch)]
        losses = self.backward_next_tokens(batches, sft.mtp_weight, sft.balance_alpha)
        norm = self.update(lr, sft.bias_speed)
        tokens = sum(batch.loss_mask.numel() for batch in batches)
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        return {
            **losses,
            "answer_tokens": sum(int(batch.loss_mask.sum()) for batch in batches),
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": tokens / (time.perf_counter() - start),
        }

    def evaluate(self) -> dict[str, Any]:
        """Loss of held-out answers, nats per token: of all, of each source, and MTP's."""
        sums: dict[str, tuple[float, float, int]] = {}
        for name, samples in self.held_out.items():
            if any(len(sample) <= self.rows.seq_len + 1 for sample in samples):
                sums[name] = masked_loss(self.model, samples, self.rows.seq_len, self.rows.pad)
        total = sum(n for *_, n in sums.values())
        return {
            "loss": sum(main for main, _, _ in sums.values()) / max(1, total),
            "mtp_loss": sum(mtp for _, mtp, _ in sums.values()) / max(1, total),
            "sources": {name: main / max(1, n) for name, (main, _, n) in sums.items()},
            "answer_tokens": total,
        }


@torch.no_grad()
def masked_loss(
    model: Transformer, samples: Sequence[ChatSample], seq_len: int, pad: int
) -> tuple[float, float, int]:
    """(nats of the answers, nats of MTP's first depth, answer tokens) of samples; longer ones than a row are left out."""
    rows = ChatRows(samples, seq_len, 16, pad=pad)
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    main = mtp = 0.0
    count = 0
    for step in range(rows.steps_per_epoch):
        (batch,) = (b.to(device) for b in rows.batches(step))
        output = model.loss(
            batch.tokens,
            cu_seqlens=batch.cu_seqlens,
            positions=batch.positions,
            loss_mask=batch.loss_mask,
            mtp_weight=1.0,
            balance_alpha=0.0,
            normalizer=1.0,
        )
        main += float(output.main)
        mtp += sum(map(float, output.mtp[:1]))
        count += int(batch.loss_mask.sum())
    model.train(was_training)
    return main, mtp, count


def answers(
    model: Transformer, tokenizer: Tokenizer, chats: Mapping[str, Sequence[list[dict[str, str]]]]
) -> list[dict[str, str]]:
    """Greedy answers to the first held-out questions of each source."""
    was_training = model.training
    model.eval()
    longest = model.config.max_positions - SHOWN_TOKENS
    found = []
    for name, group in chats.items():
        prompts = [(m, encode_prompt(tokenizer, m[:-1])) for m in group]
        found += [(name, m, p) for m, p in prompts if len(p) <= longest][:SHOWN]
    if not found:
        return []
    drawn = generate(model, [p for *_, p in found], SHOWN_TOKENS, eos=tokenizer.eos_id)
    model.train(was_training)
    return [
        {
            "source": name,
            "question": messages[-2]["content"],
            "wanted": messages[-1]["content"],
            "answer": tokenizer.decode(new, skip_special=True),
        }
        for (name, messages, _), new in zip(found, drawn.tokens, strict=True)
    ]
