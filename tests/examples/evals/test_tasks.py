"""Arithmetic, multiple choice, HumanEval and needles on answers that are known."""

import gzip
import json
import math
import re
from types import SimpleNamespace

import pytest

from examples.errors import UserError
from examples.evals import arithmetic, humaneval, multiple_choice, needle
from examples.evals.multiple_choice import ChoiceQuestion
from examples.rewards.sandbox import Limits
from tests.examples.sandboxes import make_sandbox

# --- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", arithmetic.TASKS)
def test_questions_are_right_and_different(task):
    items = arithmetic.questions(task, 40)
    assert len({item.question for item in items}) == 40
    for item in items:
        formula = re.search(r"[-(\d][-+*()\d\s]*", item.question.split(":")[-1])[0].strip()
        assert "/" not in formula
        assert eval(formula, {"__builtins__": {}}) == int(
            item.answer
        )  # numbers and + - * only, as the line above says
    more = arithmetic.questions(task, 40, exclude={item.question for item in items})
    assert not {item.question for item in items} & {item.question for item in more}
    assert arithmetic.questions(task, 5) == items[:5]


def test_wrong_answers_of_a_generator_are_noticed():
    # Without parentheses the pinned generator ignores precedence in two items of three.
    items = arithmetic.questions("basic_arithmetic", 30, allow_parentheses=False, min_terms=3, max_terms=4)
    assert all(arithmetic.answer_is_right(item.question, item.answer) for item in items)
    assert arithmetic.answer_is_right("Calculate -5 * (2 + 3).", "-25")
    assert not arithmetic.answer_is_right("Calculate -5 * (2 + 3).", "25")
    assert not arithmetic.answer_is_right("What is the capital of France?", "Paris")


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" 42\nQuestion: 7", "42"), (" so \\boxed{7} and \\boxed{8}.", "8"), ("\n\nThe answer is 1,250.", "1,250"),
     ("3 + 4 = 7", "7"), ("-5.", "-5."), ("", ""), ("none", "none"), ("It is 1/2", "1/2")],
)  # fmt: skip
def test_stated_answer(text, answer):
    assert arithmetic.stated_answer(text) == answer


def test_arithmetic_is_scored():
    items = arithmetic.questions("chain_sum", 10, max_digits=1)
    right, records = arithmetic.evaluate(
        lambda prompts: [f" {item.answer}\n" for item in items], items, "sums"
    )
    assert (right.value, right.count, right.name) == (1.0, 10, "sums") and records[0]["said"].startswith(" ")
    wrong, records = arithmetic.evaluate(
        lambda prompts: [f" {int(item.answer) + 1}" for item in items], items
    )
    assert wrong.value == 0.0 and not any(record["right"] for record in records)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: arithmetic.questions("gcd", 1),
            "task: must be one of basic_arithmetic, chain_sum; got 'gcd'",
        ),
        (lambda: arithmetic.questions("chain_sum", 0), "count: must be at least 1; got 0"),
        (
            lambda: arithmetic.questions("chain_sum", 500, max_digits=1, max_terms=2),
            "has only .* new questions; got 500",
        ),
        (lambda: arithmetic.evaluate(list, []), "there is no question"),
    ],
)
def test_arithmetic_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


# --- multiple choice -----------------------------------------------------------------------------------------------


def test_the_most_probable_choice_is_the_answer():
    items = [
        ChoiceQuestion("q1", ("a", "bbbb"), 1),
        ChoiceQuestion("q2", ("cc", "d"), 0),
        ChoiceQuestion("q3", ("e", "f", "g"), 2),
    ]
    table = {("q1", "a"): -2.0, ("q1", "bbbb"): -4.0, ("q2", "cc"): -1.0, ("q2", "d"): -3.0,
             ("q3", "e"): -3.0, ("q3", "f"): -2.0, ("q3", "g"): -1.0}  # fmt: skip
    by_sum, by_byte = multiple_choice.evaluate(lambda pairs: [(table[pair], False) for pair in pairs], items)
    assert by_sum.value == pytest.approx(2 / 3)  # the short wrong choice of q1 wins
    assert by_byte.value == 1.0
    assert by_sum.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_a_model_that_knows_nothing_is_labelled(text_model):
    items = multiple_choice.arithmetic_choices(
        arithmetic.questions("chain_sum", 12, max_digits=1, max_terms=2)
    )
    by_sum, _ = multiple_choice.evaluate(text_model.loglikelihood, items)
    assert by_sum.near_chance and by_sum.chance == 0.25 and "near chance" in str(by_sum)


def test_arithmetic_choices_hold_the_answer_once():
    questions = arithmetic.questions("chain_sum", 20)
    items = multiple_choice.arithmetic_choices(questions)
    for item, question in zip(items, questions, strict=True):
        assert item.choices[item.answer] == f" {question.answer}" and len(set(item.choices)) == 4
    assert len({item.answer for item in items}) == 4  # no place is always right


def test_cloze_questions_go_on_where_the_text_does():
    documents = [f"{letter}{i:05} " * 60 for i, letter in enumerate("abcdefgh")]
    items = multiple_choice.cloze_questions(documents, 15, context=40, ending=20)
    assert items == multiple_choice.cloze_questions(documents, 15, context=40, ending=20)
    for item in items:
        assert any(item.context + item.choices[item.answer] in text for text in documents)
        others = [choice for place, choice in enumerate(item.choices) if place != item.answer]
        assert not any(item.context + other in text for other in others for text in documents)
    with pytest.raises(UserError, match="need 4 documents of 260 characters; got 0"):
        multiple_choice.cloze_questions(["short"] * 9, 2)
    with pytest.raises(UserError, match="too alike"):
        multiple_choice.cloze_questions(["x" * 300] * 4, 2)


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "Sky?", "choices": ["blue", "red"], "answer": 0}\n\n')
    assert multiple_choice.read_questions(path) == [
        ChoiceQuestion("Question: Sky?\nAnswer:", (" blue", " red"), 0)
    ]
    for line, message in (
        ("{", ":1: must be an object"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', ":1: multiple choice: needs 2 choices or more"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "the index of one of them; got 2, 2"),
        ('{"question": "a", "choices": ["b", "b"], "answer": 0}', "must differ"),
        ('{"question": "a", "choices": ["b", 3], "answer": 0}', "must be strings"),
        ('{"question": "a", "answer": 0}', "choices"),
        ("", "there is no question in it"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=message):
            multiple_choice.read_questions(path)


# --- HumanEval -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
    return make_sandbox(limits=Limits(wall_seconds=120, cpu_seconds=2))


def test_own_problems_can_be_solved_and_missed(sandbox):
    solutions = [problem.canonical_solution for problem in humaneval.OWN]
    solved = humaneval.evaluate(lambda prompts, number: solutions, humaneval.OWN, sandbox)
    assert solved["pass@1"] == 1.0 and solved["problems"] == len(humaneval.OWN)
    missed = humaneval.evaluate(
        lambda prompts, number: ["    return None\n"] * len(prompts), humaneval.OWN, sandbox
    )
    assert missed["pass@1"] == 0.0, missed


def test_pass_at_k_counts_samples(sandbox):
    """Of four samples of the first problem two pass, of the second none."""
    problems = humaneval.OWN[:2]

    def complete(prompts, number):
        assert prompts == [problem.prompt for problem in problems]
        return ["    return a + b\n\ndef more(" if number % 2 else "    return a - b\n", "    return 0\n"]

    result = humaneval.evaluate(complete, problems, sandbox, samples=4, ks=(1, 2))
    assert result["passed"] == {"own/add": 2, "own/largest": 0}
    assert result["pass@1"] == pytest.approx(0.25)
    assert result["pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    with pytest.raises(UserError, match="k must be 1 to samples = 2; got 3"):
        humaneval.evaluate(complete, problems, sandbox, samples=2, ks=(3,))


def test_problems_from_files(tmp_path):
    record = {name: f"{name}!" for name in humaneval.FIELDS} | {"more": 1}
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_text(json.dumps(record) + "\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert humaneval.read_problems(plain) == humaneval.read_problems(packed)
    assert humaneval.read_problems(plain)[0].entry_point == "entry_point!"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="must be JSON lines, packed by gzip"):
        humaneval.read_problems(packed)
    del record["test"]
    plain.write_text("\n" + json.dumps(record))
    with pytest.raises(UserError, match=r":2: needs the strings .* missing test"):
        humaneval.read_problems(plain)
    with pytest.raises(UserError, match="No such file"):
        humaneval.read_problems(tmp_path / "none.jsonl")


# --- needles -------------------------------------------------------------------------------------------------------


def test_a_needle_lies_at_its_depth():
    filler, fact, question = list(range(100, 200)), [1, 2], [3]
    for depth, place in ((0.0, 0), (0.5, 8), (1.0, 16)):
        prompt = needle.hide(filler, fact, question, 0, 20, depth)
        assert len(prompt) == 20 and prompt[0] == 0 and prompt[-1] == 3
        assert prompt[1 + place : 3 + place] == fact
        assert [token for token in prompt if token >= 100] == filler[:16]
    with pytest.raises(UserError, match="needs 16 tokens of filler beside 4 of its own; got 5"):
        needle.hide(filler[:5], fact, question, 0, 20, 0.5)
    with pytest.raises(UserError, match="context of 3 needs 0 tokens of filler"):
        needle.hide(filler, fact, question, 0, 3, 0.5)


def test_needles_have_different_answers_and_ask_for_them():
    needles = needle.make_needles(20)
    assert len({n.answer for n in needles}) == 20
    assert all(n.fact.strip() == (n.question + n.answer).strip() + "." for n in needles)
    assert needles == needle.make_needles(20)


class Finder:
    """Stands in for generate and score_continuations: finds a needle unless it lies in the first quarter of a long context."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, model, prompts, new):
        said = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            number = re.search(r"is (\d+)\.", text)
            lost = len(prompt) > 60 and number.start() / len(text) < 0.25
            said.append(self.tokenizer.encode(" 0000" if lost else f" {number[1]} and")[:new])
        return type("G", (), {"tokens": said})

    def score(self, model, pairs, batch_size):
        return [(-1.0 * len(context), False) for context, _ in pairs]


def test_the_grid_tells_where_needles_are_lost(text_model, monkeypatch):
    finder = Finder(text_model.tokenizer)
    monkeypatch.setattr(needle, "generate", finder.generate)
    monkeypatch.setattr(needle, "score_continuations", finder.score)
    stand_in = SimpleNamespace(config=SimpleNamespace(max_positions=1000), eval=lambda: None)
    filler = text_model.tokenizer.encode("In the beginning God created the heaven. " * 40)
    grid = needle.evaluate(stand_in, text_model.tokenizer, filler, (55, 120), (0.0, 1.0))
    assert grid.accuracy == [[1.0, 1.0], [0.0, 1.0]]
    assert grid.log_p == [[-55.0, -55.0], [-120.0, -120.0]]
    assert grid.low[0][0] < 1.0 == grid.high[0][0] and grid.trials == 4
    assert json.loads(json.dumps(grid.to_dict()))["lengths"] == [55, 120]


def test_the_grid_runs_on_a_model(text_model):
    filler = list(range(20, 90))
    short = [needle.Needle("x 5.", "x", " 5")]
    grid = needle.evaluate(
        text_model.model, text_model.tokenizer, filler, (16, 28), (0.0, 1.0), needles=short
    )
    assert all(math.isfinite(value) and value < 0 for row in grid.log_p for value in row)
    with pytest.raises(UserError, match=r"at most model\.max_positions - 2 = 30; got 31"):
        needle.evaluate(text_model.model, text_model.tokenizer, filler, (31,), needles=short)
    with pytest.raises(UserError, match="depths in"):
        needle.evaluate(text_model.model, text_model.tokenizer, filler, (16,), (1.5,), needles=short)
