"""A finished run of every stage on a micro model, made once; and commands that die at a chosen moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..train.conftest import MICRO

REPOSITORY = Path(__file__).parents[3]
MICRO_SFT = [
    "sft.held_out_every=5",
    "sft.batch_size=4",
    "sft.micro_batch=3",
    "sft.schedule.peak=1e-2",
    "sft.eval_every=4",
    "sft.checkpoint_every=3",
]
MICRO_BENCHMARKS = [
    "benchmarks.documents=4",
    "benchmarks.document_tokens=40",
    "benchmarks.cloze=3",
    "benchmarks.verified=12",
    "benchmarks.arithmetic=5",
    "benchmarks.code_samples=1",
    "benchmarks.code_k=1",
    "benchmarks.code_tokens=4",
    "benchmarks.needles=1",
    "benchmarks.needle_lengths=0.8",
    "benchmarks.needle_depths=0.5",
]
# Some steps of everything. GRPO's rewards may all be 0 and distillation may keep few answers: nothing here depends on it.
MICRO_RECIPE = [
    *MICRO,
    "train.schedule.total_tokens=1024",
    "sft.sources=sums",
    "sft.counts=70",
    *MICRO_SFT,
    "grpo.task=sums",
    "grpo.steps=5",
    "grpo.prompts=4",
    "grpo.group=4",
    "grpo.updates=2",
    "grpo.minibatches=2",
    "grpo.learning_rate=1e-3",
    "grpo.max_new_tokens=4",
    "grpo.micro_batch=3",
    "grpo.reference_every=2",
    "grpo.eval_prompts=8",
    "grpo.eval_every=2",
    "grpo.checkpoint_every=2",
    "distill.problems=70",
    "distill.samples=64",
    "distill.max_new_tokens=4",
    "sft.seq_len=100",
    "reward.system=Compare.",
    "reward.sources=sums,brevity",
    "reward.counts=20,20",
    "reward.held_out=6",
    "reward.max_rationale=12",
    "reward.vote_pairs=4",
    "reward.votes=2",
    "reward.checkpoint_every=4",
    *MICRO_BENCHMARKS,
]


class Command:
    """Runs `examples.run` on the micro recipe in forks of one process that has imported everything and done nothing."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("moments.py"))],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def arguments(self, root, stages):
        """The command line."""
        return ["tiny", "--threads", "1", *MICRO_RECIPE, "--run-dir", str(root), "--stages", stages]

    def __call__(self, arguments, root, folder=None, last=None):
        """(exit status, what it printed, how often it touched each folder); `last`: the touch of `folder` at which it is killed."""
        job = {"arguments": arguments, "root": str(root), "folder": folder, "last": last}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer["status"], answer["said"], answer["counts"]


@pytest.fixture(scope="session")
def command():
    """Runs commands."""
    running = Command()
    yield running
    running.server.stdin.close()
    running.server.wait(60)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, command):
    """(run folder in which every stage has finished, how often each touched the disk)."""
    from examples.stages import RECIPE

    root = tmp_path_factory.mktemp("recipe") / "run"
    status, said, counts = command(command.arguments(root, ",".join(s.name for s in RECIPE)), root)
    assert status == 0, said[-3000:]
    return root, counts
