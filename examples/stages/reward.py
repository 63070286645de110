"""The model-based reward (report section 5.2.1): preferences with a rationale, a judge fine-tuned from SFT, its agreement.

The pairs are made of what is known to be better (`examples.rewards.pairs`), answers of the policy itself among them, or are the
user's. Training is SFT's, on chats in which the assistant explains and then decides. Agreement on held-out pairs, always asked in
both orders, is measured for each kind before and after: a judge of this size is good at some kinds and guesses at others, and
one number would hide that. Last, voting (section 5.4.2): one sampled judgement against the majority of several.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.configs import RunConfig
from examples.configs.reward import RewardConfig
from examples.data.chat import chat, encode_prompt
from examples.data.chat_sources import Problem, sums
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rewards.model import (
    Judge,
    JudgeReward,
    Preference,
    agreement,
    read_preferences,
    training_chats,
    voting_agreement,
    write_preferences,
)
from examples.rewards.pairs import GENERATED, SOURCES, policy_pairs, user_pairs
from examples.rollout.group import sample_groups
from examples.stages.sft import SftTrainer
from examples.stages.stage import Context
from examples.stages.tasks import make_verified
from examples.stages.tokenize import tokenizer_path
from examples.train.loop import check_tokenizer
from examples.train.runner import Weights, start_weights

JUDGE_BATCH = 64
PROMPTS_AT_ONCE = 64
PROGRESS_SECONDS = 5.0
LOSS_PAIRS = 12  # held-out pairs of each kind whose loss is measured; agreement, which takes all, says more
SHOWN = 2  # held-out pairs of each kind whose rationales are shown

Kinds = dict[str, list[Preference]]


def run(context: Context) -> dict[str, Any]:
    """Train the judge from the weights of `reward.start`."""
    config = context.config.reward
    tokenizer = Tokenizer.load(tokenizer_path(context.root))
    check_tokenizer(context.config, tokenizer.vocab_size)
    weights = start_weights(context.root / config.start)
    train, held_out = open_pairs(context, tokenizer, weights)
    trainer = RewardTrainer(context.config, context.folder, weights, tokenizer, train, held_out)
    rows = trainer.rows
    print(
        f"  {sum(map(len, train.values()))} pairs, each in both orders ({rows.dropped} chats too long for a row), "
        f"{trainer.total_steps} steps",
        flush=True,
    )
    first, last = trainer.run()
    for kind, row in last["agreement"].items():
        label = ", near chance" if row["near_chance"] else ""
        print(
            f"  {kind:18} agreement {first['agreement'][kind]['value']:.3f} -> {row['value']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] of {row['count']}{label}; same verdict in both orders "
            f"{row['consistent']:.2f}, first place {row['first']:.2f}",
            flush=True,
        )
    voting = trainer.voting()
    for kind, row in voting.items():
        print(
            f"  {kind:18} one sampled judgement {row['single']['value']:.3f}, majority of {row['votes']} "
            f"{row['voted']['value']:.3f} of {row['voted']['count']}",
            flush=True,
        )
    samples = trainer.samples()
    for sample in samples[::SHOWN]:
        print(f"  [{sample['kind']}] {sample['prompt'][:50]!r}: {sample['rationale'][:70]!r}", flush=True)
    return {
        "steps": trainer.step,
        "pairs": {name: len(group) for name, group in train.items()},
        "dropped": rows.dropped,
        "unread": trainer.unread,
        "before": first,
        "after": last,
        "voting": voting,
        "samples": samples,
    }


# --- pairs ---------------------------------------------------------------------------------------------------------


def open_pairs(context: Context, tokenizer: Tokenizer, weights: Weights) -> tuple[Kinds, Kinds]:
    """(to train on, held out) by kind: made once, then read from the stage's folder, so that a resumed run has the same."""
    paths = [context.folder / name for name in ("pairs_train.jsonl", "pairs_held_out.jsonl")]
    if not paths[1].exists():  # written last
        policy = weights.build().eval()
        for path, kinds in zip(paths, make_pairs(policy, tokenizer, context.config), strict=True):
            write_preferences(path, [replace(p, kind=kind) for kind, group in kinds.items() for p in group])
    both: tuple[Kinds, Kinds] = ({}, {})
    for path, kinds in zip(paths, both, strict=True):
        for preference in read_preferences(path):
            kinds.setdefault(preference.kind, []).append(preference)
    return both


def make_pairs(policy: Transformer, tokenizer: Tokenizer, config: RunConfig) -> tuple[Kinds, Kinds]:
    """(to train on, held out) of every source and of every file of the user's."""
    c = config.reward
    train, held_out = user_pairs(c.user, c.held_out_every)
    for number, (name, count) in enumerate(zip(c.sources, c.counts, strict=True)):
        if name not in SOURCES:
            raise UserError(f"reward.sources: must be among {', '.join(SOURCES)}; got {name!r}")
        seed = 1000 * c.seed + number
        if name in GENERATED:
            train[name] = GENERATED[name](sums(count, seed), random.Random(seed))
            held_out[name] = GENERATED[name](sums(c.held_out, seed, held_out=True), random.Random(seed))
            continue
        task = make_verified(config)
        for kinds, problems in ((train, task.train[:count]), (held_out, task.held_out[: c.held_out])):
            answers = sample_answers(policy, tokenizer, problems, config, seed)
            pairs = policy_pairs(problems, answers, task.verifier)
            print(
                f"  policy: right and wrong answers to {len(pairs)} of {len(problems)} problems", flush=True
            )
            if pairs:  # a policy that is always right, or always wrong, has none
                kinds[name] = pairs
    for name in train.keys() ^ held_out.keys():  # measured only if trained on, trained on only if measured
        train.pop(name, None)
        held_out.pop(name, None)
    if not train:
        raise UserError(
            "reward.sources: there is no pair, for the policy has no right answer beside a wrong one"
        )
    return train, held_out


def sample_answers(
    policy: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], config: RunConfig, seed: int
) -> list[list[str]]:
    """`reward.answers` finished answers of the policy to each problem, or fewer: what was cut says nothing about being right."""
    c = config.reward
    prompts = [encode_prompt(tokenizer, chat(p.question, "")[:1]) for p in problems]
    found: list[list[str]] = []
    begin = printed = time.monotonic()
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        outputs = sample_groups(
            policy,
            some,
            c.answers,
            c.max_new_tokens,
            eos=tokenizer.eos_id,
            temperature=c.temperature,
            seed=seed * 1_000_003 + start,
        )
        for at in range(0, len(outputs), c.answers):
            group = [o for o in outputs[at : at + c.answers] if o.ended]
            found.append([tokenizer.decode(o.tokens, skip_special=True) for o in group])
        if time.monotonic() - printed > PROGRESS_SECONDS:
            printed = time.monotonic()
            left = (printed - begin) / len(found) * (len(prompts) - len(found))
            print(f"  answers to {len(found)}/{len(prompts)} problems, ETA {left:.0f} s", flush=True)
    return found


# --- the judge ------------------------------------------------------------------------------------------------------


def make_judge(model: Transformer, tokenizer: Tokenizer, c: RewardConfig, temperature: float = 0.0) -> Judge:
    """A judge as the configuration has it."""
    return Judge(
        model,
        tokenizer,
        system=c.system,
        max_rationale=c.max_rationale,
        temperature=temperature,
        batch_size=JUDGE_BATCH,
    )


def trained_judge(root: Path, config: RunConfig, tokenizer: Tokenizer) -> JudgeReward:
    """The judge of a run's finished stage, as a reward of GRPO (`grpo.judge`)."""
    model = start_weights(root / config.grpo.judged_by).build().eval()
    return JudgeReward(make_judge(model, tokenizer, config.reward))


# --- training ------------------------------------------------------------------------------------------------------


class RewardTrainer(SftTrainer):
    """SFT on the chats of a judge; its evaluation is SFT's and, by kind, the agreement on held-out pairs."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        weights: Weights,
        tokenizer: Tokenizer,
        train: Mapping[str, Sequence[Preference]],
        held_out: Mapping[str, Sequence[Preference]],
    ) -> None:
        self.reward, self.tokenizer = config.reward, tokenizer
        c = config.reward
        settings = replace(
            config.sft,
            start=c.start,
            schedule=c.schedule,
            batch_size=c.batch_size,
            micro_batch=c.micro_batch,
            mtp_weight=0.0,  # nobody drafts a judge's rationale
            eval_every=c.eval_every,
            checkpoint_every=c.checkpoint_every,
            seed=c.seed,
        )
        few = {name: group[:LOSS_PAIRS] for name, group in held_out.items()}
        chats = [
            {name: [m for p in group for m in training_chats(p, c.system)] for name, group in kinds.items()}
            for kinds in (train, few)
        ]
        super().__init__(replace(config, sft=settings), folder, weights, tokenizer, *chats)
        judge = self.judge()
        self.preferences: Kinds = {}  # held out, as far as the judge can read them
        for name, group in held_out.items():
            readable = [p for p in group if judge.reads(p.prompt, p.chosen, p.rejected)]
            if readable:
                self.preferences[name] = readable
        self.unread = sum(map(len, held_out.values())) - sum(map(len, self.preferences.values()))
        if not self.preferences:
            raise UserError(
                f"reward: no held-out pair is short enough for a judge that reads {judge.room} tokens (model.max_positions - "
                "reward.max_rationale - the verdict)"
            )

    def judge(self, temperature: float = 0.0) -> Judge:
        """A judge with the weights of this moment."""
        return make_judge(self.model, self.tokenizer, self.reward, temperature)

    def evaluate(self) -> dict[str, Any]:
        """SFT's losses; "agreement": of each kind a score with its interval, consistency and bias."""
        found = {}
        for kind, pairs in self.preferences.items():
            row = agreement(self.judge(), pairs)
            found[kind] = {**row.pop("agreement").to_dict(), **row, "name": kind}
        self.model.train()
        return {**super().evaluate(), "agreement": found}

    def voting(self) -> dict[str, Any]:
        """Of each kind: agreement of one sampled judgement and of the majority of `reward.votes`."""
        c, found = self.reward, {}
        judge = self.judge(c.vote_temperature)
        for kind, pairs in self.preferences.items() if c.vote_pairs else ():
            row = voting_agreement(judge, pairs[: c.vote_pairs], c.votes)
            found[kind] = {**row, "single": row["single"].to_dict(), "voted": row["voted"].to_dict()}
        return found

    def samples(self) -> list[dict[str, Any]]:
        """What the judge says about the first held-out pairs of each kind, the chosen response in the first place."""
        shown = [(kind, p) for kind, pairs in self.preferences.items() for p in pairs[:SHOWN]]
        compared = self.judge().compare([(p.prompt, p.chosen, p.rejected) for _, p in shown])
        return [
            {
                "kind": kind,
                "prompt": p.prompt,
                "chosen": p.chosen,
                "rejected": p.rejected,
                "rationale": c.forward.rationale,
                "probability_of_chosen": c.probability,
                "consistent": c.consistent,
            }
            for (kind, p), c in zip(shown, compared, strict=True)
        ]
