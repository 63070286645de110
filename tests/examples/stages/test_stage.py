"""Stages with nothing in them: what is run, what is refused, what a folder tells; and a real one made again from its folder."""

import json
import shutil
from dataclasses import replace

import pytest

from examples.configs import get_config, to_dict
from examples.errors import UserError
from examples.run import main
from examples.stages import RECIPE, record
from examples.stages.stage import Stage, made_from, open_run, remove_from, run_stages


class Kitchen:
    """Four stages, each of which returns what `results` holds for it; `ran` tells which ran."""

    def __init__(self, root):
        self.root, self.ran, self.config = root, [], get_config("tiny")
        self.results = {"flour": 1, "dough": 2, "bread": 3, "menu": 4}
        self.stages = [
            Stage("flour", (), self.cook, ""),
            Stage("dough", ("flour",), self.cook, ""),
            Stage("bread", ("dough",), self.cook, ""),
            Stage("menu", ("flour",), self.cook, "", uses=("dough", "bread"), derived=True),
        ]
        open_run(root, self.config, fresh=False)

    def cook(self, context):
        self.ran.append(context.name)
        return {"value": self.results[context.name], "rollout_seconds": len(self.ran)}

    def run(self, *names):
        self.ran.clear()
        run_stages([s for s in self.stages if s.name in names], self.root, self.config, self.stages)
        return self.ran

    def digest(self, name):
        return record.output_of(self.root, name)


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path / "run")


def test_the_order_of_the_recipe_is_one_in_which_it_can_run():
    assert RECIPE[-1].name == "report" and RECIPE[-1].derived
    done = set()
    for stage in RECIPE:
        assert done.issuperset(stage.needs) and done.issuperset(stage.uses), stage.name
        done.add(stage.name)


def test_what_a_folder_tells(kitchen):
    kitchen.run("flour", "dough")
    begun, done = (json.loads((kitchen.root / "dough" / n).read_text()) for n in ("stage.json", "done.json"))
    assert begun["stage"] == "dough" and begun["inputs"] == {"flour": kitchen.digest("flour")}
    assert begun["config"] == json.loads(json.dumps(to_dict(kitchen.config)))
    assert begun["seeds"]["train.seed"] == kitchen.config.train.seed and "grpo.seed" in begun["seeds"]
    (process,) = begun["processes"]
    assert process["environment"]["torch"] and process["environment"]["threads"] >= 1
    assert process["environment"]["code"].keys() == {"commit", "dirty", "tree"}
    assert done["output"] == kitchen.digest("dough")
    assert done["seconds"] >= 0 and done["peak_memory_mib"] > 1


def test_finished_stages_are_kept_and_what_only_tells_of_them_is_made_again(kitchen):
    assert kitchen.run("flour", "dough", "menu") == ["flour", "dough", "menu"]
    assert kitchen.run("flour", "dough", "menu") == []
    assert kitchen.run("bread", "menu") == ["bread", "menu"]  # there is one more thing to tell
    assert kitchen.run("menu") == []


def test_an_input_that_came_out_otherwise_is_refused_and_named(kitchen):
    kitchen.run("flour", "dough", "bread", "menu")
    record.remove(kitchen.root, "flour")
    kitchen.results["flour"] = 10
    assert kitchen.run("flour") == ["flour"]
    for names in (("dough",), ("bread",), ("menu",), ("flour", "dough")):
        with pytest.raises(
            UserError,
            match=r"stage 'dough' was made from an output of 'flour' that is no longer there.*--fresh-from dough",
        ):
            kitchen.run(*names)
    assert kitchen.ran == []
    assert remove_from(kitchen.root, "dough", kitchen.stages, kitchen.config) == ["dough", "bread", "menu"]
    assert kitchen.run("flour", "dough", "bread", "menu") == ["dough", "bread", "menu"]


def test_an_unfinished_stage_does_not_go_on_from_another_input(kitchen):
    kitchen.run("flour", "dough")
    (kitchen.root / "dough" / "done.json").unlink()  # as if it had been killed on its way
    record.remove(kitchen.root, "flour")
    kitchen.results["flour"] = 10
    with pytest.raises(UserError, match="stage 'dough' was made from an output of 'flour'"):
        kitchen.run("flour", "dough")


def test_an_input_made_again_with_the_same_output_changes_nothing(kitchen):
    kitchen.run("flour", "dough", "bread")
    first = kitchen.digest("flour")
    record.remove(kitchen.root, "flour")
    assert kitchen.run("flour", "dough", "bread") == ["flour"]
    assert kitchen.digest("flour") == first  # though "rollout_seconds" is another


def test_a_folder_of_an_older_version_is_taken_as_it_is(kitchen):
    kitchen.run("flour", "dough")
    for name in ("flour", "dough"):
        (kitchen.root / name / "stage.json").unlink()
        path = kitchen.root / name / "done.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "output"}))
    assert kitchen.run("flour", "dough", "bread") == ["bread"]


def test_a_stage_needs_the_one_that_its_configuration_starts_from(tmp_path):
    kitchen = Kitchen(tmp_path / "run")
    kitchen.config = replace(kitchen.config, sft=replace(kitchen.config.sft, start="dough"))
    kitchen.stages[2] = Stage("sft", ("flour",), kitchen.cook, "")
    kitchen.stages[3] = replace(kitchen.stages[3], uses=())
    kitchen.results["sft"] = 3
    with pytest.raises(UserError, match="stage 'sft' needs stage 'dough', which has not finished"):
        kitchen.run("flour", "sft")
    kitchen.run("dough", "sft")
    begun = record.read_begun(kitchen.root, "sft")
    assert begun["inputs"] == {name: kitchen.digest(name) for name in ("flour", "dough")}
    kitchen.config = replace(kitchen.config, sft=replace(kitchen.config.sft, start="cake"))
    with pytest.raises(UserError, match=r"sft: must start from a stage .*; got 'cake'"):
        kitchen.run("sft")


def test_a_killed_stage_tells_of_both_processes(kitchen):
    kitchen.run("flour")
    (kitchen.root / "flour" / "done.json").unlink()
    kitchen.run("flour")
    assert len(json.loads((kitchen.root / "flour" / "stage.json").read_text())["processes"]) == 2


def test_fresh_deletes_everything(kitchen):
    kitchen.run("flour", "dough")
    open_run(kitchen.root, replace(kitchen.config, name="other"), fresh=True)
    assert [p.name for p in kitchen.root.iterdir()] == ["config.json"]


def test_what_an_output_is_made_of(kitchen):
    stages = {s.name: s for s in kitchen.stages}
    assert [s.name for s in made_from(stages["bread"], kitchen.stages, kitchen.config)] == ["flour", "dough"]
    assert made_from(stages["flour"], kitchen.stages, kitchen.config) == []
    timed = {"loss": 1.0, "seconds": 3, "rows": [{"tokens_per_second": 4, "steps": 2}]}
    assert record.without_timings(timed) == {"loss": 1.0, "rows": [{"steps": 2}]}


# --- made again -------------------------------------------------------------------------------------------------------


def test_a_stage_made_again_from_its_folder_alone_is_equal_to_the_bit(command, recipe, tmp_path):
    whole, _ = recipe
    copy = tmp_path / "somewhere" / "sft"
    shutil.copytree(whole / "sft", copy)
    root = tmp_path / "again"
    status, said, _ = command(["--from", str(copy), "--run-dir", str(root)], root)
    assert status == 0, said[-2000:]
    stages = ("tokenize", "pretrain", "extend", "sft")
    for name in stages:
        assert f"{name}: equal to the bit" in said
        assert record.output_of(root, name) == record.output_of(whole, name)
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(stages)

    other = json.loads((copy / "done.json").read_text()) | {"output": "0" * 16}
    (copy / "done.json").write_text(json.dumps(other))
    status, said, _ = command(["--from", str(copy), "--run-dir", str(root)], root)
    assert status == 1 and "sft: DIFFERS" in said and "pretrain: equal to the bit" in said


def test_mistakes_with_from_are_one_line(capsys, tmp_path):
    def error_of(*arguments):
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "--from: takes configuration and stages from the folder" in error_of(
        "tiny", "--from", str(tmp_path)
    )
    assert "must be the folder of a stage, with a stage.json" in error_of("--from", str(tmp_path))
    assert "name: must be a configuration" in error_of()
    assert "--fresh-from: must be among" in error_of(
        "tiny", "--run-dir", str(tmp_path / "x"), "--fresh-from", "y"
    )
    (tmp_path / "stage.json").write_text('{"format": "cake 1"}')
    assert "format 'cake 1'" in error_of("--from", str(tmp_path))
