"""SFT and GRPO stages on a micro model: they learn, continue to the bit after kill -9, and do not depend on how a batch is cut."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from examples.configs import get_config, parse_overrides, to_dict
from examples.configs.post_training import REFLECTION
from examples.data.chat import chat, read_chats
from examples.data.chat_sources import Problem
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.rewards import rules
from examples.rewards.style import StyleLimits
from examples.rollout.group import Rollout, sample_groups
from examples.run import main
from examples.stages import distill, grpo, sft
from examples.stages.sft import SftTrainer, split
from examples.stages.stage import Context
from examples.stages.tasks import Task, make_task, make_verified
from examples.stages.tokenize import tokenizer_path
from examples.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from examples.train.grpo import advantages
from examples.train.metrics import read_metrics
from examples.train.runner import Weights, start_weights

from ..train.conftest import MICRO
from .conftest import MICRO_SFT

REPOSITORY = Path(__file__).parents[3]
POST = [
    *MICRO,
    "train.schedule.total_tokens=512",
    "sft.start=pretrain",
    "sft.sources=sums",
    "sft.counts=70",
    *MICRO_SFT,
    "grpo.steps=5",
    "grpo.prompts=4",
    "grpo.group=4",
    "grpo.updates=2",
    "grpo.minibatches=2",
    "grpo.learning_rate=1e-3",
    "grpo.max_new_tokens=4",
    "grpo.micro_batch=3",
    "grpo.beta=0.001",
    "grpo.kl_every=0",
    "grpo.reference_every=2",
    "grpo.eval_prompts=8",
    "grpo.eval_every=2",
    "grpo.checkpoint_every=2",
    "grpo.task=sums",
    "grpo.rules=length",
    "grpo.rule_weights=0.5",
    "grpo.gate=no",
    "distill.problems=70",
    "distill.samples=8",
    "distill.max_new_tokens=8",
]
ARGUMENTS = ["tiny", "--threads", "1", *POST]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run folder with a micro model in it."""
    root = tmp_path_factory.mktemp("post") / "start"
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "tokenize,pretrain"]) == 0
    return root


@pytest.fixture(scope="module")
def finished(pretrained):
    """The same with SFT and GRPO."""
    root = pretrained.parent / "finished"
    shutil.copytree(pretrained, root)
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "sft,grpo"]) == 0
    return root


def result(root, stage):
    return json.loads((root / stage / "done.json").read_text())["result"]


def test_sft_lowers_the_loss_of_held_out_answers_and_of_mtp(finished):
    sft = result(finished, "sft")
    assert sft["after"]["loss"] < sft["before"]["loss"] - 0.5
    assert sft["after"]["mtp_loss"] < sft["before"]["mtp_loss"] - 0.5
    assert sft["answers"][0].keys() >= {"question", "wanted", "answer", "after"}
    steps = [r for r in read_metrics(finished / "sft" / "metrics.jsonl") if "lr" in r]
    assert steps[0]["lr"] == 1e-2 and steps[-1]["lr"] == 4e-4  # the first and the last step of the cosine
    assert len(steps) == sft["steps"] and all(a["lr"] > b["lr"] for a, b in pairwise(steps))


def test_sft_starts_from_the_stage_that_is_named(pretrained):
    """Whose model may be of another shape than the configuration's: a stage between may have changed it."""
    root = pretrained.parent / "another"
    shutil.copytree(pretrained, root)
    context = Context(root, "sft", parse_overrides(get_config("tiny"), [*POST, "sft.start=longer"]))
    with pytest.raises(UserError, match="longer: must hold a checkpoint to start from"):
        sft.run(context)
    start = start_weights(root / "pretrain")
    changed = {k: v + 1 if k.endswith("router.bias") else v for k, v in start.model.items()}
    shape = to_dict(replace(start.config, max_positions=64))
    tensors = {"model": changed, "optimizer": {"masters": start.masters}}
    save_checkpoint(root / "longer", 1, tensors, {"config": {"model": shape}})
    sft.run(context)
    learnt = start_weights(root / "sft")
    assert learnt.config.max_positions == 64
    for name, value in learnt.model.items():
        if name.endswith("router.bias"):
            assert torch.equal(value, changed[name])


def test_the_routing_bias_stands_still_and_mtp_moves_in_sft_only(pretrained, finished):
    states = [start_weights(root / s).model for root, s in (
        (pretrained, "pretrain"), (finished, "sft"), (finished, "grpo"))]  # fmt: skip
    for name in states[0]:
        if name.endswith("router.bias"):
            assert torch.equal(states[0][name], states[1][name]) and torch.equal(
                states[0][name], states[2][name]
            )
    weight = "mtp.0.proj.weight"
    assert not torch.equal(states[0][weight], states[1][weight])
    assert torch.equal(states[1][weight], states[2][weight])


def test_grpo_writes_the_metrics_that_tell_a_broken_run(finished):
    records = [r for r in read_metrics(finished / "grpo" / "metrics.jsonl") if "reward" in r]
    assert len(records) == 5 == result(finished, "grpo")["steps"]
    for r in records:
        assert 0 <= r["accuracy"] <= r["reward"] <= 1.5 and r["reward_std"] >= 0 and 0 <= r["computed"] <= 1
        assert 0 <= r["zero_variance_groups"] <= 1 and r["entropy"] > 0
        assert 1 <= r["length"] <= 4 and r["kl"] >= 0 and 0 <= r["clip_fraction"] <= 1
        assert r["rollout_gap"] < 0.05  # bf16 here; what replay leaves
    assert records[0]["kl"] > 0  # the second update has left the reference


def test_kill_nine_in_both_stages_and_resume(pretrained, finished):
    broken = pretrained.parent / "broken"
    shutil.copytree(pretrained, broken)
    command = [
        sys.executable,
        "-m",
        "examples.run",
        *ARGUMENTS,
        "--run-dir",
        str(broken),
        "--stages",
        "sft,grpo",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for stage, lines in (("sft", 6), ("grpo", 5)):
        process = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
        metrics = broken / stage / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
        assert not (broken / stage / "done.json").exists()
    last = subprocess.run(command, check=False, cwd=REPOSITORY, timeout=240, **pipes)
    assert last.returncode == 0 and "continuing from step" in last.stdout, last.stdout
    for stage in ("sft", "grpo"):
        (a, b) = (load_checkpoint(list_checkpoints(root / stage)[-1]) for root in (finished, broken))
        assert a.meta == b.meta
        assert_equal(a.tensors, b.tensors)
        rows = [
            [{k: v for k, v in r.items() if k not in ("tokens_per_second", "rollout_seconds")} for r in lines]
            for lines in (read_metrics(root / stage / "metrics.jsonl") for root in (finished, broken))
        ]
        assert rows[0] == rows[1]
        assert result(finished, stage) == result(broken, stage)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_equal(value, b[name])
        else:
            assert torch.equal(value, b[name]), name


def test_neither_side_of_the_split_is_empty_and_equals_stay_together():
    chats = {"a": [chat(str(i % 40), "x") for i in range(80)], "b": [chat("last", "x")]}
    train, held_out = split(chats, 5)
    sides = [{m[0]["content"] for group in side.values() for m in group} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 41 and 3 <= len(sides[1]) <= 15
    two = split({"a": [chat("1", "x"), chat("2", "x"), chat("1", "x")]}, 1000)
    assert all(two) and sum(len(side["a"]) for side in two) == 3
    with pytest.raises(UserError, match="at least 2 different conversations; got 1"):
        split({"a": [chat("1", "x")] * 3}, 2)


# --- distillation --------------------------------------------------------------------------------------------------


def stand_in(tokenizer, calls):
    """A policy that writes, of each sum, these answers; wrong ones only for sums below zero."""

    def sample_groups(model, prompts, group, max_new_tokens, *, eos, temperature, seed):
        calls.append(len(prompts))
        outputs = []
        for prompt in prompts:
            text = tokenizer.decode(prompt, skip_special=True)
            assert text.startswith(REFLECTION)
            value = eval(text.removeprefix(REFLECTION).rstrip(" ="))
            good, bad = (f"{value}", f"{value + 1}") if value >= 0 else (f"{value - 1}", "x")
            answers = [f"so it = {good}", good, good, f"={good}", bad, "", f"** $ = {good}"]
            for answer in answers:
                tokens = [*tokenizer.encode(answer), eos]
                outputs.append(Rollout(prompt, tokens, True, torch.zeros(len(tokens)), torch.zeros(1, 1, 1)))
            tokens = tokenizer.encode(good)
            outputs.append(Rollout(prompt, tokens, False, torch.zeros(len(tokens)), torch.zeros(1, 1, 1)))
        assert len(outputs) == group * len(prompts)
        return outputs

    return sample_groups


def test_distillation_keeps_what_the_verifier_accepts_in_both_forms_and_samples_once(finished, monkeypatch):
    config = parse_overrides(get_config("tiny"), POST)
    tokenizer = Tokenizer.load(tokenizer_path(finished))
    context, calls = Context(finished, "distill", config), []
    context.folder.mkdir()
    monkeypatch.setattr(distill, "sample_groups", stand_in(tokenizer, calls))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SftTrainer, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        distill.run(context)
    assert calls == [64, 6]  # 70 problems
    record = distill.run(context)
    assert calls == [64, 6], "an interrupted fine-tuning samples again"
    table = record["rejection"]
    problems = make_verified(config).train[:70]
    right = sum(int(p.answer) >= 0 for p in problems)
    assert 0 < right < 70 and table["problems"] == 70
    assert table["answers"] == 70 * 8 == sum(table[reason] for reason in distill.REASONS)
    assert table["kept"] == right and table["unfinished"] == 70 and table["repeated"] == right
    assert table["wrong"] == 2 * right + 7 * (70 - right)
    assert table["badly written"] == right and table["faults"] == {"open formula": right}
    assert table["longer than those kept"] == 2 * right
    assert table["mean_length_kept"] < table["mean_length_drawn"]
    chats = list(read_chats(finished / "distill" / "distilled.jsonl"))
    assert len(chats) == 2 * right
    for with_system, plain in zip(chats[::2], chats[1::2], strict=True):
        assert with_system[0] == {"role": "system", "content": REFLECTION} and len(plain) == 2
        assert with_system[1:] == plain
        assert eval(plain[0]["content"].rstrip(" =")) == int(plain[1]["content"])
    assert all(loss > 0 for loss in record["held_out_loss"]) and record["steps"] > 0
    for name in ("before", "after", "asked_to_reflect"):
        assert {"accuracy", "length"} <= record[name].keys()


def test_an_expert_that_is_never_right_is_said(finished, tmp_path, monkeypatch):
    config = parse_overrides(get_config("tiny"), POST)
    tokenizer = Tokenizer.load(tokenizer_path(finished))
    monkeypatch.setattr(distill, "sample_groups", stand_in(tokenizer, []))
    task = replace(make_verified(config), verifier=lambda *_: 0.0)
    with pytest.raises(
        UserError, match=r"none of 560 answers of the expert is right and well written: .*'wrong': 490"
    ):
        distill.sample(start_weights(finished / "sft").build(), tokenizer, task, config)


def test_rejection_by_hand():
    tokenizer = Tokenizer.train(["1 2 3 4 5 6 7 8 9"], 300)
    task = Task("t", (), (), rules.number, rules.number)
    problem = Problem("3 + 4 =", "7")
    eos = tokenizer.eos_id

    def output(text, ended=True):
        tokens = [*tokenizer.encode(text), *([eos] if ended else [])]
        return Rollout([1], tokens, ended, torch.zeros(len(tokens)), torch.zeros(1, 1, 1))

    drawn = [output(t) for t in ("+7", "8", "7", "7", "\\boxed{7}", "seven", "it = 7 \\boxed{7")]
    drawn += [output("7", ended=False), output("so $ = 7")]
    style = StyleLimits(boxed=False)
    kept, fates, faults = distill.select(tokenizer, task, problem, drawn, 1, style)
    assert [text for _, text in kept] == ["7"] and faults == {"open formula": 1}
    assert dict(fates) == {
        "kept": 1, "wrong": 3, "unfinished": 1, "badly written": 1, "repeated": 1, "longer than those kept": 2
    }  # fmt: skip
    kept, fates, _ = distill.select(tokenizer, task, problem, drawn, 2, style)
    assert [text for _, text in kept] == ["7", "+7"] and fates["longer than those kept"] == 1
    kept, _, faults = distill.select(tokenizer, task, problem, drawn, 9, StyleLimits())
    assert [text for _, text in kept] == ["\\boxed{7}"] and faults["no boxed answer"] == 4


# --- the gradient of a GRPO batch ----------------------------------------------------------------------------------


class Setting:
    """A trainer in fp32 on the micro model, and a batch of its rollouts."""

    def __init__(self, root, folder, **changes):
        config = parse_overrides(get_config("tiny"), POST)
        self.config = replace(
            config, grpo=replace(config.grpo, **({"updates": 1, "minibatches": 1} | changes))
        )
        tokenizer = Tokenizer.load(tokenizer_path(root))
        bf16 = start_weights(root / "sft")
        model = {k: v.float() if v.is_floating_point() else v for k, v in bf16.model.items()}
        weights = Weights(replace(bf16.config, precision="fp32"), model, {})
        self.trainer = grpo.GrpoTrainer(self.config, folder, weights, tokenizer, make_task(self.config))
        with torch.no_grad():  # away from the reference, so that KL has a gradient
            for p in self.trainer.model.parameters():
                p.add_(0.02 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) if p.ndim > 1 else 0)  # fmt: skip
        self.outputs = sample_groups(
            self.trainer.model, self.trainer.prompts[:4], 4, 4, eos=tokenizer.eos_id, seed=3
        )
        rewards = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.advantage = advantages(rewards)[0].flatten()

    def gradient(self, micro_batch, row=None, outputs=None, advantage=None):
        trainer, found = self.trainer, {}
        trainer.settings = replace(trainer.settings, micro_batch=micro_batch)
        whole, trainer.row = trainer.row, row or trainer.row

        def update(lr, bias_speed):
            found.update({n: g.clone() for n, g in trainer.optimizer.grads.items()})
            trainer.optimizer.zero()
            return 0.0

        trainer.update = update
        trainer.learn(outputs or self.outputs, self.advantage if advantage is None else advantage)
        trainer.row = whole
        return found


def difference(a, b):
    """Largest relative difference of two sets of gradients; of a tensor that hardly gets any, relative to the largest."""
    assert a.keys() == b.keys() and len(a) > 10
    floor = 1e-2 * max(float(value.norm()) for value in b.values())
    return max(float((a[n] - b[n]).norm()) / max(float(b[n].norm()), floor) for n in a)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_gradient_does_not_depend_on_packing_or_accumulation(finished, tmp_path, name):
    setting = Setting(finished, tmp_path, normalization=name)
    whole = setting.gradient(0)
    assert any(g.abs().max() > 0 for g in whole.values())
    assert difference(setting.gradient(1), whole) < 3e-5
    assert difference(setting.gradient(3), whole) < 3e-5
    longest = max(len(o.prompt) + len(o.tokens) for o in setting.outputs)
    assert difference(setting.gradient(2, row=longest), whole) < 3e-5  # most outputs alone in their rows
    order = [7, 3, 0, 12, 5, 1, 14, 9, 2, 15, 4, 8, 13, 6, 10, 11]
    moved = setting.gradient(0, None, [setting.outputs[i] for i in order], setting.advantage[order])
    assert difference(moved, whole) < 3e-5


def test_outputs_that_are_computed_once_have_the_gradient_of_all(finished, tmp_path, monkeypatch):
    """Half of the outputs repeat another of their group, with its reward."""
    setting = Setting(finished, tmp_path)
    twins = [replace(setting.outputs[i // 2 * 2]) for i in range(16)]
    gain = setting.advantage[[i // 2 * 2 for i in range(16)]]
    merged = setting.gradient(0, None, twins, gain)
    monkeypatch.setattr(grpo, "merge_equal", lambda outputs, which, gains: (list(which), [1] * len(which)))
    assert difference(setting.gradient(0, None, twins, gain), merged) < 3e-5
    assert difference(setting.gradient(0, None, twins, gain * 2), merged) > 1e-2


def test_groups_without_variance_move_nothing(finished, tmp_path):
    setting = Setting(finished, tmp_path, beta=0.0)
    value, same = advantages(torch.full((4, 4), 0.1, dtype=torch.float64))
    assert bool(same.all())
    before = {name: value.clone() for name, value in setting.trainer.model.state_dict().items()}
    assert setting.gradient(0, advantage=value.flatten()) == {}, (
        "an optimizer step with nothing to learn from"
    )
    for name, now in setting.trainer.model.state_dict().items():
        assert torch.equal(now, before[name])


def test_what_is_not_computed_has_no_gradient(finished, tmp_path):
    """Without a KL term, groups without variance are left out; with a reference to compare to, they are computed."""
    gain = Setting(finished, tmp_path).advantage.clone()
    gain[4:12] = 0
    left_out = Setting(finished, tmp_path, beta=0.0)
    assert left_out.trainer.reference is None
    measured = Setting(finished, tmp_path, beta=0.0, kl_every=1)
    assert measured.trainer.reference is not None
    for setting in (left_out, measured):
        setting.outputs = left_out.outputs
    gradients = [setting.gradient(0, None, None, gain) for setting in (left_out, measured)]
    assert difference(*gradients) < 3e-5


def test_what_does_not_fit_or_is_not_there_is_said(finished, tmp_path):
    with pytest.raises(UserError, match=r"grpo.max_new_tokens: .*data.seq_len = 32"):
        Setting(finished, tmp_path, max_new_tokens=30)
    with pytest.raises(UserError, match="must hold a checkpoint to start from"):
        start_weights(tmp_path / "nothing")
