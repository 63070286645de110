"""The judge's stage on a micro model: pairs, agreement that a biased judge cannot win, kill -9, and its reward in a GRPO step."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.configs import get_config, parse_overrides
from examples.configs.reward import RewardConfig
from examples.data.chat_sources import is_held_out, sums
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.rewards.model import Judge, Judgement, Preference, agreement, voting_agreement
from examples.rewards.pairs import GENERATED, policy_pairs, user_pairs
from examples.rewards.rules import number
from examples.run import main
from examples.stages import grpo
from examples.stages.reward import make_pairs, trained_judge
from examples.stages.tasks import make_task
from examples.stages.tokenize import tokenizer_path
from examples.train.checkpoint import list_checkpoints, load_checkpoint
from examples.train.metrics import read_metrics
from examples.train.runner import start_weights

from ..train.conftest import MICRO
from .test_post import assert_equal

REPOSITORY = Path(__file__).parents[3]
SETTINGS = [
    *MICRO,
    "train.schedule.total_tokens=512",
    "sft.start=pretrain",
    "sft.sources=sums",
    "sft.counts=40",
    "sft.seq_len=100",
    "sft.batch_size=4",
    "sft.schedule.peak=1e-2",
    "grpo.task=sums",
    "grpo.steps=1",
    "grpo.prompts=2",
    "grpo.group=4",
    "grpo.max_new_tokens=4",
    "grpo.eval_prompts=4",
    "reward.system=Compare.",
    "reward.schedule.peak=1e-2",
    "reward.schedule.final=2e-3",
    "reward.schedule.epochs=1",
    "reward.batch_size=4",
    "reward.sources=sums,brevity",
    "reward.counts=20,20",
    "reward.held_out=6",
    "reward.max_rationale=12",
    "reward.max_new_tokens=4",
    "reward.vote_pairs=4",
    "reward.votes=2",
    "reward.eval_every=8",
    "reward.checkpoint_every=4",
]
ARGUMENTS = ["tiny", "--threads", "1", *SETTINGS]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run folder with a micro model in it, fine-tuned a little."""
    root = tmp_path_factory.mktemp("reward") / "start"
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "tokenize,pretrain,sft"]) == 0
    return root


@pytest.fixture(scope="module")
def finished(started):
    """The same with a judge."""
    root = started.parent / "finished"
    shutil.copytree(started, root)
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "reward"]) == 0
    return root


def result(root):
    return json.loads((root / "reward" / "done.json").read_text())["result"]


# --- the stage -----------------------------------------------------------------------------------------------------


def test_the_result_says_for_each_kind_what_was_measured_on_how_many(finished):
    found = result(finished)
    assert found["pairs"] == {"sums": 20, "brevity": 20} and found["unread"] == 0
    for moment in ("before", "after"):
        assert found[moment]["agreement"].keys() == {"sums", "brevity"}
        for row in found[moment]["agreement"].values():
            assert (
                row["count"] == 6 and row["chance"] == 0.5 and 0 <= row["low"] <= row["value"] <= row["high"]
            )
            assert row["near_chance"] == (row["low"] <= 0.5) and 0 <= row["first"] <= 1
    assert found["after"]["loss"] < found["before"]["loss"] - 0.5
    assert {row["votes"] for row in found["voting"].values()} == {2}
    assert {row["voted"]["count"] for row in found["voting"].values()} == {4}
    assert {s["kind"] for s in found["samples"]} == {"sums", "brevity"}
    assert found["samples"][0].keys() >= {
        "prompt",
        "chosen",
        "rejected",
        "rationale",
        "probability_of_chosen",
    }
    held_out = [r["held_out"] for r in read_metrics(finished / "reward" / "metrics.jsonl") if "held_out" in r]
    assert held_out[0] == found["before"] and held_out[-1] == found["after"] and len(held_out) >= 3


def test_kill_nine_and_resume(started, finished):
    broken = started.parent / "broken"
    shutil.copytree(started, broken)
    command = [
        sys.executable,
        "-m",
        "examples.run",
        *ARGUMENTS,
        "--run-dir",
        str(broken),
        "--stages",
        "reward",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
    metrics, deadline = broken / "reward" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 7:  # the first evaluation and 6 steps
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read()
    last = subprocess.run(command, check=False, cwd=REPOSITORY, timeout=240, **pipes)
    assert last.returncode == 0 and "continuing from step" in last.stdout, last.stdout
    a, b = (load_checkpoint(list_checkpoints(root / "reward")[-1]) for root in (finished, broken))
    assert a.meta == b.meta
    assert_equal(a.tensors, b.tensors)
    assert result(finished) == result(broken)


def test_the_judge_is_a_reward_of_grpo(finished, tmp_path):
    """A step on a task whose reward is the judge; what a group gets is what the judge says."""
    config = parse_overrides(get_config("tiny"), [*SETTINGS, "grpo.judge=1", "grpo.gate=false"])
    tokenizer = Tokenizer.load(tokenizer_path(finished))
    reward = trained_judge(finished, config, tokenizer)
    judge, task = reward.judge, make_task(config, reward)
    trainer = grpo.GrpoTrainer(config, tmp_path, start_weights(finished / "sft"), tokenizer, task)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.train_step()
    assert metrics["accuracy"] < metrics["reward"] and metrics["zero_variance_groups"] < 1
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    problem = task.train[0]
    answer = problem.answer
    assert task.reward(problem.question, "x", answer) == reward(problem.question, "x", answer)
    assert reward(problem.question, answer, problem.answer) == pytest.approx(0.5, abs=1e-6)
    other = judge.compare([(problem.question, "x", answer)])[0].probability
    assert reward(problem.question, "x", problem.answer) == pytest.approx(other, abs=1e-6)
    assert reward(problem.question, "word " * 100, problem.answer) == 0.0  # cannot be read


# --- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", sorted(GENERATED))
def test_generated_pairs_prefer_what_is_better(name, held_out):
    problems = sums(40, 3, held_out=held_out)
    pairs = GENERATED[name](problems, random.Random(0))
    assert [p.prompt for p in pairs] == [p.question for p in problems]
    assert {is_held_out(p.prompt) for p in pairs} == {held_out}
    for pair in pairs:
        right = eval(pair.prompt.rstrip(" ="))
        assert int(pair.chosen) == right and pair.rationale.startswith(f"{right} is")
        if name == "brevity":
            assert str(right) in pair.rejected and len(pair.rejected) > len(pair.chosen)
        elif name == "sums":
            assert 0 < abs(int(pair.rejected) - right) <= 10
        else:
            assert not -18 <= int(pair.rejected) <= 27


def test_policy_pairs_need_a_right_and_a_wrong_answer():
    problems = sums(4, 0)
    right = [p.answer for p in problems]
    answers = [["x", right[0], "y"], [right[1]] * 3, ["x", "y", "z"], []]
    (pair,) = policy_pairs(problems, answers, number)
    assert (pair.prompt, pair.chosen, pair.rejected) == (problems[0].question, right[0], "x")
    (pair,) = policy_pairs(problems[:1], [[right[0], "x", "y"]], number)
    assert (pair.chosen, pair.rejected) == (right[0], "x")


def test_a_policy_that_knows_nothing_leaves_its_kind_out(started, monkeypatch):
    config = parse_overrides(
        get_config("tiny"), [*SETTINGS, "reward.sources=policy,sums", "reward.counts=3,3"]
    )
    monkeypatch.setattr("examples.stages.reward.sample_answers", lambda *a: [["x", "y"]] * len(a[2]))
    train, held_out = make_pairs(None, None, config)
    assert train.keys() == held_out.keys() == {"sums"}
    config = parse_overrides(config, ["reward.sources=policy", "reward.counts=3"])
    with pytest.raises(UserError, match="there is no pair"):
        make_pairs(None, None, config)


def test_users_pairs_are_split_by_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": str(i % 30), "chosen": f"a{i}", "rejected": "b", "rationale": ""} for i in range(90)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train, held_out = (side[f"user:{path}"] for side in user_pairs([str(path)], 4))
    assert len(train) + len(held_out) == 90
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    few = user_pairs([str(path)], 10**9)
    assert [len(side[f"user:{path}"]) for side in few] == [1, 1]  # neither side is empty
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="at least 2 different prompts"):
        user_pairs([str(path)], 4)


# --- measuring -----------------------------------------------------------------------------------------------------


class Fake:
    """A judge whose every judgement is `says(prompt, first, second, seed)`: the probability of the first."""

    temperature = 1.0

    def __init__(self, says):
        self.says = says

    def judge(self, triples, seed=0):
        return [Judgement(self.says(*triple, seed), "", True) for triple in triples]

    compare = Judge.compare


PAIRS = [Preference(str(i), "good", "bad", "") for i in range(40)]


@pytest.mark.parametrize("votes", [1, 2, 3, 5])
def test_a_liking_for_a_place_is_worth_chance(votes):
    judge = Fake(lambda prompt, first, second, seed: 0.9)
    found = agreement(judge, PAIRS)
    assert found["agreement"].value == 0.5 and found["agreement"].near_chance
    assert found["first"] == pytest.approx(0.9) and found["consistent"] == 0
    votes = voting_agreement(Fake(lambda prompt, first, second, seed: 1.0), PAIRS, votes)
    assert votes["single"].value == votes["voted"].value == 0.5


def test_voting_by_hand():
    """Right in 2 of 3 judgements of every pair: one is right in 2/3, the majority always."""
    judge = Fake(lambda prompt, first, second, seed: float((first == "good") == (seed != 1_000_003)))
    found = voting_agreement(judge, PAIRS, 3)
    assert found["single"].value == pytest.approx(2 / 3) and found["voted"].value == 1.0
    assert found["unanimous"] == 0 and found["voted"].count == 40
    assert agreement(judge, PAIRS)["agreement"].value == 1.0
    unsure = voting_agreement(
        Fake(lambda p, first, second, seed: 0.75 if first == "good" else 0.25), PAIRS, 101
    )
    assert (
        abs(unsure["single"].value - 0.75) < 0.05 and unsure["voted"].value == 1.0
    )  # drawn with its probability
    with pytest.raises(UserError, match="temperature > 0"):
        voting_agreement(type("Cold", (), {"temperature": 0.0})(), PAIRS, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"votes": 5}, "reward.votes: must be even"),
        ({"counts": (1,)}, "reward.counts: must be one of 1 or more for each of 4 sources"),
        ({"sources": (), "counts": ()}, "hold no preference"),
        ({"temperature": 0.0}, "reward.temperature: must be positive; got 0.0"),
        ({"answers": 1}, "reward.answers: must be at least 2; got 1"),
    ],
)
def test_limits(values, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**values)
    quick = RewardConfig(counts=(1, 2, 3, 400)).quick()
    assert (quick.sources, quick.counts) == (("size", "brevity"), (1, 400))
    assert RewardConfig(sources=("sums",), counts=(5,)).quick().counts == (5,)
