"""Rules on responses written for them: the box that counts, tests that cannot be left early, form, language."""

import pytest

from examples.errors import UserError
from examples.rewards.rules import (
    Code,
    Weighted,
    boxed,
    boxed_answer,
    code_block,
    exact,
    language,
    length,
    maths,
    number,
    reflection,
    reflections,
    run_tests,
    scripts,
    tags,
)
from examples.rewards.sandbox import Limits
from tests.examples.sandboxes import make_sandbox


@pytest.fixture(scope="module")
def box():
    return make_sandbox(limits=Limits(wall_seconds=120, cpu_seconds=1))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} done", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{[1, 2\\}} }", "[1, 2\\}"),
        ("\\boxed {\n 3 }", "3"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{1} but \\boxed{2", None),  # the last one was cut off: there is no answer
        ("\\boxed{a\\", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, answer):
    assert boxed_answer(text) == answer


def test_maths_reward():
    assert maths("", "Half: \\boxed{\\frac12}", "0.5") == 1.0
    assert maths("", "Half: \\boxed{\\frac12}", "We get \\boxed{0.5}") == 1.0
    assert maths("", "0.5", "0.5") == 0.0  # the right number outside a box
    assert maths("", "\\boxed{0.5} or \\boxed{0.6}", "0.5") == 0.0
    assert maths("", "\\boxed{}", "0.5") == 0.0


ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        (ADD, True),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n" + ADD, True),
        (ADD + "if __name__ == '__main__':\n    raise SystemExit('asks for input')\n", True),
        ("def add(a, b):\n    return a - b\n", False),
        ("def add(a, b:\n", False),
        ("", False),
        (ADD + "raise SystemExit(0)\n", False),  # leaving early is not passing
        (ADD + "import os; os._exit(0)\n", False),
        ("def add(a, b):\n    import os; os._exit(0)\n", False),
        (ADD + "print('passed ' + '0' * 32)\nimport os; os._exit(0)", False),
        ("def add(a, b):\n    while True: pass\n", False),
    ],
)  # fmt: skip
def test_code_passes_its_tests_or_not(box, code, passed):
    assert run_tests(box, code, TESTS)[0] is passed


def test_code_reward_takes_the_last_block(box):
    rule = Code(box)
    response = (
        f"First\n```python\ndef add(a, b): return 0\n```\nbetter:\n```\n{ADD}```\n```json\n{{}}\n```\nDone."
    )
    assert code_block(response) == ADD
    assert rule("", response, TESTS) == 1.0
    assert rule("", ADD, TESTS) == 0.0  # not in a block
    assert code_block("```python\nx = 1\n") is None  # cut off


def test_tags():
    rule = tags("think", "answer")
    good = "<think>\nhm\n</think>\n<answer>4</answer>\n"
    assert rule("", good, "") == 1.0
    for bad in (
        good + "more",
        "say " + good,
        good.replace("</think>", ""),
        "<answer>4</answer><think>hm</think>",
        "<think> </think><answer>4</answer>",
        good + good,
        "<think>a</think><answer>b</answer></answer>",
        "<think>a<think></think><answer>b</answer>",
    ):
        assert rule("", bad, "") == 0.0, bad


def test_reflection():
    assert reflections("Wait, let me check: 3 * 4 = 12. Alternatively, verify by addition.") == 4
    assert reflection("", "Hold on.", "") == 1.0
    assert reflection("", "The waiter checked out; 12.", "") == 0.0


def test_length():
    rule = length(10, shortest=4, margin=5)
    values = [rule("", "word " * words, "") for words in (0, 2, 4, 10, 11, 14, 15, 30)]
    assert values == pytest.approx([0, 0.5, 1, 1, 0.8, 0.2, 0, 0])
    assert length(3, margin=0)("", "a b c d", "") == 0.0
    with pytest.raises(UserError, match="0 <= shortest <= longest"):
        length(3, shortest=4)


def test_language_follows_the_prompt():
    assert language("Why is the sky blue?", "Because of scattering.", "") == 1.0
    assert language("Why is the sky blue?", "因为散射", "") == 0.0
    assert language("天空为什么是蓝色的？", "因为 scattering", "") == pytest.approx(2 / 12)
    assert language("空はなぜ青いの？", "散乱のためです", "") == 1.0  # kanji and kana
    assert language("Почему небо синее?", "Из-за рассеяния, $x$ и `def f()` и \\frac{}{}.", "") == 1.0
    assert language("2 + 2 =", "Vier.", "") == language("Why?", "42", "") == 1.0
    assert scripts("a b я 中 ```code``` $x$") == {"LATIN": 2, "CYRILLIC": 1, "CJK": 1}


def test_weighted_rewards_and_their_gate():
    rules = {"maths": (maths, 1.0), "form": (length(3), 0.5)}
    assert Weighted(rules)("", "\\boxed{4}", "4") == 1.5
    assert Weighted(rules)("", "\\boxed{5}", "4") == 0.5
    assert Weighted(rules, gate="maths")("", "\\boxed{5}", "4") == 0.0
    assert Weighted(rules).parts("", "\\boxed{5}", "4") == {"maths": 0.0, "form": 1.0}
    with pytest.raises(UserError, match="gate must name one of the rules maths, form; got 'code'"):
        Weighted(rules, gate="code")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 1.0),
        (" +7\n", 1.0),
        ("first \\boxed{3}, no, \\boxed{7}.", 1.0),
        ("07", 1.0),
        ("3+1=4, 4+3=7", 1.0),
        ("3 + 4", 0.0),  # maths would find it right
        ("3 + 4 =", 0.0),
        ("-7", 0.0),
        ("7.", 0.0),
        ("7 7", 0.0),
        ("٧", 0.0),
        ("", 0.0),
        ("\\boxed{}", 0.0),
        ("9" * 99, 0.0),
    ],
)
def test_number(text, value):
    assert number("3 + 4 =", text, "7") == value


def test_exact_is_about_characters_and_boxed_about_the_box():
    assert exact("sort 920", "029", "029") == exact("sort 920", "it = 029 ", "029") == 1
    assert exact("sort 920", "\\boxed{029}", "029") == 1
    assert exact("sort 920", "29", "029") == exact("sort 920", "029.", "029") == exact("", "", "029") == 0
    assert number("sort 920", "29", "029") == 1
    assert boxed("", "so \\boxed{8}", "7") == 1
    assert boxed("", "so 7", "7") == boxed("", "\\boxed{}", "7") == boxed("", "\\boxed{7", "7") == 0
