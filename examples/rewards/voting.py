"""Self-rewarding by voting (report section 5.4.2): a model judges its own responses several times and the majority counts.

A judge is any callable; what it says is compared with `==`, or with `same`, so that it can vote on a response (good, bad) or
for one (A, B, or the answer that it arrived at itself). None is an abstention.

    vote([True, True, None, False])       Vote(winner=True, share=2/3, ...)
    Voting(judge, votes=6)(prompt, response, reference) -> 1.0, 0.0, or `undecided`
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.errors import UserError

Judge = Callable[
    [str, str, str, int], bool | None
]  # prompt, response, reference, number of the vote (its seed)


@dataclass(frozen=True)
class Vote:
    """winner: the judgement with most votes; None if there was a tie, too few votes, or no majority where one is needed.
    share: of the votes that were cast. counts: per judgement, in the order of their first vote. abstained: how many."""

    winner: Any
    share: float
    counts: tuple[tuple[Any, int], ...]
    abstained: int

    @property
    def tie(self) -> bool:
        """Whether two or more share the first place."""
        top = max((count for _, count in self.counts), default=0)
        return sum(count == top for _, count in self.counts) > 1


def vote(
    judgements: Iterable[Any],
    *,
    same: Callable[[Any, Any], bool] = operator.eq,
    quorum: int = 1,
    absolute: bool = False,
) -> Vote:
    """Count judgements.

    same: when two say the same (`examples.rewards.maths.same_answer` for answers); the first of a group stands for it.
    quorum: fewer votes than this decide nothing. absolute: the winner needs more than half of the votes cast.
    """
    counts: list[list[Any]] = []
    abstained = 0
    for judgement in judgements:
        if judgement is None:
            abstained += 1
            continue
        for group in counts:
            if same(group[0], judgement):
                group[1] += 1
                break
        else:
            counts.append([judgement, 1])
    cast = sum(count for _, count in counts)
    ordered = sorted(counts, key=lambda group: -group[1])  # stable
    result = Vote(None, 0.0, tuple((group, count) for group, count in counts), abstained)
    if not ordered or cast < quorum:
        return result
    winner, most = ordered[0]
    share = most / cast
    decided = not result.tie and (not absolute or 2 * most > cast)
    return Vote(winner if decided else None, share, result.counts, abstained)


def majority_answer(
    answers: Sequence[str | None], same: Callable[[str, str], bool] = operator.eq
) -> str | None:
    """The answer that most samples agree on (maj@k): of those in a tie the first; None if nobody answered."""
    result = vote(answers, same=same)
    return max(result.counts, key=lambda group: group[1])[0] if result.counts else None


@dataclass(frozen=True)
class Voting:
    """A reward from `votes` judgements: 1 if most say yes, 0 if most say no, `undecided` on a tie or below `quorum`.

    The judge must differ from vote to vote (it gets the vote's number as its seed), and be deterministic for each.
    """

    judge: Judge
    votes: int = 6
    quorum: int = 1
    undecided: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= self.votes:
            raise UserError(f"voting: must have 1 <= quorum <= votes; got {self.quorum}, {self.votes}")

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        judgements = [self.judge(prompt, response, reference, number) for number in range(self.votes)]
        winner = vote(judgements, quorum=self.quorum).winner
        return self.undecided if winner is None else float(bool(winner))
