"""kill -9 at a moment of every stage, then the same command: the results are those of a run that nobody disturbed.

A moment is drawn, from a seed, among those at which the stage touches the disk (see conftest). Stages that are added to the recipe
are covered by being there.
"""

import json
import random
import shutil
import signal

import pytest

from examples.configs import get_config, parse_overrides
from examples.stages import RECIPE
from examples.stages.record import VOLATILE, without_timings
from examples.stages.stage import made_from
from examples.train.metrics import read_metrics

from .conftest import MICRO_RECIPE


def files(folder):
    """What a stage left, but for TensorBoard's files and checkpoints: the newest is in the output's digest, older ones may wait
    for the next save to remove them."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p) for p in paths if p.parts[0] not in ("checkpoints", "tensorboard")}


def told(folder):
    """Everything in a stage's folder that two executions must share."""
    done, begun = (json.loads((folder / name).read_text()) for name in ("done.json", "stage.json"))
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return {
        "result": without_timings(done["result"]),
        "output": done["output"],
        "begun": {key: value for key, value in begun.items() if key != "processes"},
        "metrics": [{k: v for k, v in line.items() if not VOLATILE.search(k)} for line in lines],
        "files": files(folder),
    }


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
@pytest.mark.parametrize("stage", RECIPE, ids=lambda stage: stage.name)
def test_kill_nine_and_the_same_command_again(command, recipe, tmp_path, stage, seed):
    whole, counts = recipe
    root = tmp_path / "run"
    inputs = [s.name for s in made_from(stage, RECIPE, parse_overrides(get_config("tiny"), MICRO_RECIPE))]
    root.mkdir()
    shutil.copy(whole / "config.json", root)
    for name in inputs:
        shutil.copytree(whole / name, root / name)
    moment = random.Random(f"{stage.name} {seed}").randint(1, counts[stage.name])
    arguments = command.arguments(root, stage.name)
    status, said, _ = command(arguments, root, stage.name, moment)
    where = f"killed at {moment} of {counts[stage.name]}"
    assert status == -signal.SIGKILL, f"{where}: {said[-2000:]}"
    assert not (root / stage.name / "done.json").exists(), where
    status, said, _ = command(arguments, root)
    assert status == 0, f"{where}: {said[-2000:]}"
    expected, found = told(whole / stage.name), told(root / stage.name)
    for key in expected:
        assert found[key] == expected[key], f"{where}: {key}"
    assert {s.name for s in RECIPE if (root / s.name).exists()} == {*inputs, stage.name}
