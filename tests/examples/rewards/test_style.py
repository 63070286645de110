"""Each fault is found in a response that has it alone."""

import pytest

from examples.errors import UserError
from examples.rewards.style import StyleLimits, faults, repetition

GOOD = "We add the two numbers: $3 + 4 = 7$. Let me check: $7 - 4 = 3$. So the answer is \\boxed{7}."
LIMITS = StyleLimits(shortest=5, longest=60, reflections=2, after=5)


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        ("\\boxed{7}", "too short"),
        ("Then we " + " ".join(f"add {i}" for i in range(40)) + " \\boxed{7}", "too long"),
        ("Wait. Wait. Wait, no. " + GOOD, "overthinking"),
        ("one two three four five six seven " * 4 + "\\boxed{7}", "repetitive"),
        ("Мы складываем числа и получаем ответ, the answer \\boxed{7}", "mixed languages"),
        ("We add the two numbers and get 7.", "no boxed answer"),
        (GOOD + " And then there is much more to say", "goes on after the answer"),
        (GOOD + "\n```\nx", "open code block"),
        ("Costs $3 in all, the answer \\boxed{7}", "open formula"),
        ("\\[ 3 + 4 = 7 so the answer is \\boxed{7}", "open bracket"),
        ("<think> " + GOOD, "open tag"),
    ],
)
def test_one_fault_at_a_time(response, fault):
    assert faults("What is 3 + 4?", response, LIMITS) == [fault]


def test_faultless():
    assert faults("What is 3 + 4?", GOOD, LIMITS) == []
    code = "Here it is:\n```python\nprice = '$'\n```\nIt is simple. \\boxed{7}"
    assert faults("What is 3 + 4?", code, LIMITS) == []
    assert faults("What?", "A plain answer without a box.", StyleLimits(boxed=False)) == []


def test_repetition():
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("a b c d e f " * 2) == pytest.approx(1 - 6 / 7)
    assert repetition("short") == 0.0


def test_errors():
    with pytest.raises(UserError, match="0 <= shortest <= longest; got 5, 4"):
        StyleLimits(shortest=5, longest=4)
