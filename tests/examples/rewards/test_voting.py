"""Majorities, ties, abstentions, quorum."""

import pytest

from examples.errors import UserError
from examples.rewards.maths import same_answer
from examples.rewards.voting import Voting, majority_answer, vote


@pytest.mark.parametrize(
    ("judgements", "options", "winner"),
    [
        ([True, True, False], {}, True),
        ([False, True, None, None, False], {}, False),
        ([True, False], {}, None),
        ([None, None], {}, None),
        ([], {}, None),
        ([True, None, None], {"quorum": 2}, None),
        (["a", "b", "c", "a"], {}, "a"),
        (["a", "b", "c", "a"], {"absolute": True}, None),
        (["a", "a", "b"], {"absolute": True}, "a"),
        (["1/2", "0.5", "2"], {"same": same_answer}, "1/2"),
    ],
)
def test_votes(judgements, options, winner):
    assert vote(judgements, **options).winner == winner


def test_what_a_vote_tells():
    result = vote(["x", None, "y", "x", "z"])
    assert result.counts == (("x", 2), ("y", 1), ("z", 1))
    assert (result.share, result.abstained, result.tie) == (0.5, 1, False)
    assert vote(["x", "y"]).tie


def test_an_unhashable_judgement_can_win():
    assert vote([[1], [2], [1]]).winner == [1]


def test_majority_answer():
    assert majority_answer(["2", "\\frac12", "0.5", None], same_answer) == "\\frac12"
    assert majority_answer(["a", "b"]) == "a"  # of a tie the first
    assert majority_answer([None]) is None


@pytest.mark.parametrize(
    ("says", "reward"),
    [([True] * 4 + [False] * 2, 1.0), ([False] * 4 + [None] * 2, 0.0), ([True] * 3 + [False] * 3, 0.25),
     ([None] * 6, 0.25), ([True] + [None] * 5, 0.25)],
)  # fmt: skip
def test_voting_is_a_reward(says, reward):
    asked = []

    def judge(prompt, response, reference, number):
        asked.append((prompt, response, reference, number))
        return says[number]

    assert Voting(judge, votes=6, quorum=2, undecided=0.25)("p", "r", "a") == reward
    assert asked == [("p", "r", "a", number) for number in range(6)]


def test_errors():
    with pytest.raises(UserError, match="1 <= quorum <= votes; got 7, 6"):
        Voting(lambda *_: True, votes=6, quorum=7)
