"""Tasks of reinforcement learning: who judges, what a reward adds to being right, and the user's own problems."""

import json

import pytest

from examples.configs import get_config, parse_overrides
from examples.data.chat_sources import is_held_out, read_problems
from examples.errors import UserError
from examples.rewards import rules
from examples.stages.tasks import TASKS, make_reward, make_task, make_verified


def config(*overrides):
    return parse_overrides(get_config("tiny"), ["grpo.eval_prompts=20", *overrides])


@pytest.mark.parametrize("name", TASKS)
def test_generated_tasks_know_their_answers_and_hold_out_by_text(name):
    task = make_task(config(f"grpo.task={name}"))
    assert task.name == name and task.reward is task.verifier
    assert len({p.question for p in task.held_out}) == 20
    assert not {p.question for p in task.held_out} & {p.question for p in task.train}
    for problem in [*task.train[:50], *task.held_out]:
        assert task.verifier(problem.question, problem.answer, problem.answer) == 1
        assert task.verifier(problem.question, problem.question, problem.answer) == 0, (
            "the question is no answer"
        )
        assert task.verifier(problem.question, "", problem.answer) == 0
    again = make_task(config(f"grpo.task={name}"))
    assert again.train == task.train and again.held_out == task.held_out
    assert make_task(config(f"grpo.task={name}", "grpo.seed=5")).train != task.train


def test_sorting_is_sorted():
    for problem in make_verified(config("grpo.task=sorting")).train[:50]:
        digits = problem.question.removeprefix("sort ")
        assert problem.answer == "".join(sorted(digits)) and len(digits) == 4


def test_a_reward_is_the_verifier_plus_weighted_rules_and_a_judge():
    c = config(
        "grpo.rules=boxed,language", "grpo.rule_weights=0.25,0.5", "grpo.judge=2.0", "grpo.gate=no"
    ).grpo
    asked = []

    def judge(prompt, response, reference):
        asked.append((prompt, response, reference))
        return 0.1

    reward = make_reward(c, rules.number, judge)
    assert reward("What is 3 + 4?", "so \\boxed{7}", "7") == pytest.approx(1 + 0.25 + 0.5 + 0.2)
    assert reward("What is 3 + 4?", "семь = 8", "7") == pytest.approx(0.2)
    assert asked == [("What is 3 + 4?", "so \\boxed{7}", "7"), ("What is 3 + 4?", "семь = 8", "7")]
    gated = make_reward(config("grpo.rules=language", "grpo.rule_weights=0.5").grpo, rules.number)
    assert gated("What is it?", "it is = 8", "7") == 0 and gated("What is it?", "it is = 7", "7") == 1.5
    with pytest.raises(UserError, match=r"grpo.judge: must be 0 without a trained judge; got 2.0"):
        make_reward(c, rules.number)


def test_what_is_unknown_is_said():
    with pytest.raises(UserError, match=r"grpo.task: must be one of sums, sorting; got 'x'"):
        make_task(config("grpo.task=x"))
    with pytest.raises(UserError, match=r"grpo.rules: must be among .*; got 'x'"):
        make_task(config("grpo.rules=x", "grpo.rule_weights=1"))
    with pytest.raises(UserError, match=r"grpo.rule_weights: must be one for each of 2 rules"):
        config("grpo.rules=boxed,language", "grpo.rule_weights=1")


def test_the_users_problems_are_judged_by_the_maths_rule(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [{"question": f"What is half of {n}?", "answer": f"{n}/2"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    train, held_out = read_problems([str(path)])
    assert len(train) + 2 * len(held_out) == 120 and 0 < len(held_out) < 20
    assert all(is_held_out(p.question) for p in held_out) and not any(is_held_out(p.question) for p in train)
    task = make_task(config(f"grpo.problems={path}", "grpo.eval_prompts=2"))
    assert task.name == "problems" and len(task.held_out) == 2
    assert task.reward("", "it is \\boxed{4.5}", "9/2") == 1 and task.reward("", "4.5", "9/2") == 0
    for content, words in (
        ('{"question": "a"}', r"mine.jsonl:1: needs the strings question and answer; missing answer"),
        ('{"question": "a", "answer": 3}', "missing answer"),
        ("[]", "must be an object; got list"),
        ("{", "not valid JSON"),
        ('{"question": "a", "answer": "3"}', "problems on both sides; got 0 to train on and 1 held out"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            read_problems([str(path)])
