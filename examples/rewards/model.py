"""The model-based reward (report section 5.2.1): a judge, trained from the SFT checkpoint, that reasons before its verdict.

Its data are preferences with a rationale, "chain-of-thought leading to the reward", which makes it harder to game than a bare
score. There is no head and no Bradley-Terry loss: a preference becomes two chats, one for each order of the responses, in which
the assistant writes the rationale and then `Verdict: 1` or `Verdict: 2`. The SFT machinery trains on them as on any chat.

    bos system <｜User｜> response 1, response 2, question <｜Assistant｜> rationale  Verdict: 1 eos

To judge, the model writes a rationale, and the probability of `1` against `2` right after `Verdict: ` is the preference. Both
orders are asked and averaged, for models like the first response, or the second.

    preferences = read_preferences(path)                         # JSONL: prompt, chosen, rejected, rationale
    chats = [chat for p in preferences for chat in training_chats(p)]     # for the SFT stage
    judge = Judge(model, tokenizer)
    agreement(judge, held_out)["agreement"]                      # a Score
    reward = JudgeReward(judge)                                  # a rule like any other: reward(prompt, response, reference)

`examples.stages.reward` is all of this in one run; `examples.rewards.pairs` makes preferences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.configs.reward import JUDGE_SYSTEM
from examples.data.chat import chat, encode_prompt
from examples.data.files import disk_errors, write_atomic
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.evals.statistics import share
from examples.evals.text_model import next_log_probabilities
from examples.model.transformer import Transformer
from examples.rewards.voting import vote
from examples.rollout.generate import generate

MARKER = "\nVerdict: "
FIELDS = ("prompt", "chosen", "rejected", "rationale")
_NAMES = ("Response 1", "Response 2")

Chat = list[dict[str, str]]
Triple = tuple[str, str, str]  # prompt, first response, second response


@dataclass(frozen=True)
class Preference:
    """rationale: why `chosen` is better; {chosen} and {rejected} in it become "Response 1" and "Response 2". kind: agreement is
    measured for each kind by itself."""

    prompt: str
    chosen: str
    rejected: str
    rationale: str
    kind: str = ""


# --- data --------------------------------------------------------------------------------------------------------


def read_preferences(path: Path) -> list[Preference]:
    """From JSONL; an error names the line."""
    with disk_errors(path, "reading"):
        content = path.read_bytes()
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        wrong = [n for n in FIELDS if not isinstance(record, dict) or not isinstance(record.get(n), str)]
        if wrong:
            raise UserError(f"{where}: needs the strings {', '.join(FIELDS)}; missing {', '.join(wrong)}")
        if record["chosen"] == record["rejected"]:
            raise UserError(f"{where}: chosen and rejected must differ; got {record['chosen'][:60]!r} twice")
        if MARKER.strip() in record["rationale"]:
            raise UserError(f"{where}: a rationale must not contain {MARKER.strip()!r}, which ends it")
        found.append(Preference(**{name: record[name] for name in FIELDS}, kind=str(record.get("kind", ""))))
    if not found:
        raise UserError(f"{path}: there is no preference in it")
    return found


def write_preferences(path: Path, preferences: Iterable[Preference]) -> None:
    """To JSONL, whole or not at all."""
    lines = [json.dumps(asdict(preference), ensure_ascii=False) + "\n" for preference in preferences]
    write_atomic(path, "".join(lines).encode())


def judge_chat(triple: Triple, system: str = JUDGE_SYSTEM, answer: str = "") -> Chat:
    """What the judge is asked, and its answer. The question is last, next to where its answer is worked out: as in the chats
    that the model was fine-tuned on."""
    prompt, first, second = triple
    question = f"{_NAMES[0]}: {first}\n\n{_NAMES[1]}: {second}\n\n{prompt}"
    return chat(question, answer, system)


def training_chats(preference: Preference, system: str = JUDGE_SYSTEM) -> tuple[Chat, Chat]:
    """The chats to train on: the chosen response first, and second."""
    chats = []
    for place in (0, 1):
        first, second = (preference.chosen, preference.rejected)[:: 1 - 2 * place]
        rationale = preference.rationale.replace("{chosen}", _NAMES[place])
        rationale = rationale.replace("{rejected}", _NAMES[1 - place])
        answer = f"{rationale}{MARKER}{place + 1}"
        chats.append(judge_chat((preference.prompt, first, second), system, answer))
    return chats[0], chats[1]


# --- judging -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """probability: that the first response is better. rationale: what was written before the verdict. finished: whether the
    model came to its verdict by itself; if not, it was asked for one where it stood."""

    probability: float
    rationale: str
    finished: bool


@dataclass(frozen=True)
class Comparison:
    """Both orders. probability: that `first` is better, the mean of both. consistent: whether they agree."""

    probability: float
    forward: Judgement
    backward: Judgement

    @property
    def consistent(self) -> bool:
        """Whether the verdict is the same in both orders."""
        return (self.forward.probability > 0.5) == (self.backward.probability < 0.5)


class Judge:
    """A model that compares two responses.

    system: what it is told, as in training. max_rationale: new tokens before it is asked for a verdict. temperature: 0 writes the
    most probable rationale; with another the seed makes judgements differ (`voting_agreement`).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str = JUDGE_SYSTEM,
        max_rationale: int = 128,
        temperature: float = 0.0,
        batch_size: int = 16,
    ) -> None:
        limit = model.config.max_positions
        if not 1 <= max_rationale < limit:
            raise UserError(f"judge: max_rationale must be 1 to {limit - 1}; got {max_rationale}")
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.max_rationale, self.temperature, self.batch_size = max_rationale, temperature, batch_size

    @property
    def room(self) -> int:
        """Most tokens of a question with its two responses."""
        return self.model.config.max_positions - self.max_rationale - len(MARKER)

    def prompt(self, triple: Triple) -> list[int]:
        """Ids of the question, up to where the rationale begins."""
        return encode_prompt(self.tokenizer, judge_chat(triple, self.system)[:-1])

    def reads(self, prompt: str, first: str, second: str) -> bool:
        """Whether they are short enough, in either order."""
        both = ((prompt, first, second), (prompt, second, first))
        return all(len(self.prompt(triple)) <= self.room for triple in both)

    def compare(self, triples: Sequence[Triple], seed: int = 0) -> list[Comparison]:
        """Is the first response better? Asked in both orders."""
        both = [*triples, *((prompt, b, a) for prompt, a, b in triples)]
        judged = self.judge(both, seed)
        pairs = zip(judged[: len(triples)], judged[len(triples) :], strict=True)
        return [Comparison(0.5 + (f.probability - b.probability) / 2, f, b) for f, b in pairs]  # 0.5 if equal

    def judge(self, triples: Sequence[Triple], seed: int = 0) -> list[Judgement]:
        """Is the first response better? Asked in this order only, which favours whatever place the model likes."""
        prompts = [self.prompt(triple) for triple in triples]
        for prompt in prompts:
            if len(prompt) > self.room:
                raise UserError(
                    f"judge: a question with its two responses may have {self.room} tokens (model.max_positions - max_rationale - "
                    f"the verdict); got {len(prompt)}"
                )
        self.model.eval()
        judged: list[Judgement | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for number, at in enumerate(range(0, len(order), self.batch_size)):
            group = order[at : at + self.batch_size]
            written = generate(
                self.model,
                [prompts[i] for i in group],
                self.max_rationale,
                eos=self.tokenizer.eos_id,
                temperature=self.temperature,
                seed=seed + number,
            ).tokens
            texts = [self.tokenizer.decode(tokens, skip_special=True) for tokens in written]
            rationales = [text.partition(MARKER)[0].replace("\ufffd", "") for text in texts]  # cut characters
            asked = [self._asked(rationale) for rationale in rationales]
            log_p = next_log_probabilities(
                self.model, [[*prompts[i], *ids] for i, (ids, _) in zip(group, asked, strict=True)]
            )
            verdicts = torch.tensor([pair for _, pair in asked], device=log_p.device)
            first = torch.softmax(log_p.gather(1, verdicts).double(), -1)[:, 0].tolist()
            for i, probability, rationale, text in zip(group, first, rationales, texts, strict=True):
                judged[i] = Judgement(probability, rationale, MARKER in text)
        return judged  # type: ignore[return-value]  # all are there

    def _asked(self, rationale: str) -> tuple[list[int], list[int]]:
        """Ids of a rationale and the marker, tokenized together as in training (".\\n" is one token), and of both verdicts."""
        ids = self.tokenizer.encode(rationale + MARKER)
        verdicts = []
        for verdict in "12":
            whole = self.tokenizer.encode(rationale + MARKER + verdict)
            if whole[:-1] != ids:
                raise UserError(
                    f"judge: the tokenizer must write {MARKER + verdict!r} with a verdict of one token"
                )
            verdicts.append(whole[-1])
        return ids[-self.max_rationale - len(MARKER) :], verdicts


@dataclass(frozen=True)
class JudgeReward:
    """Probability that a response is better than the reference, as a reward.

    reference: another response to the same prompt, in GRPO the known answer. A response equal to it is worth exactly one half. As with rules, a response that cannot be read, here because it is too
    long for the judge, is worth nothing.
    """

    judge: Judge

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        return self.many([(prompt, response, reference)])[0]

    def many(self, asked: Sequence[Triple]) -> list[float]:
        """The same for many at once, which is faster by far; what is asked twice is judged once."""
        readable = [triple for triple in dict.fromkeys(asked) if self.judge.reads(*triple)]
        compared = zip(readable, self.judge.compare(readable), strict=True)
        values = {triple: comparison.probability for triple, comparison in compared}
        return [values.get(triple, 0.0) for triple in asked]

    def vote(self, prompt: str, response: str, reference: str, number: int) -> bool | None:
        """A judgement for `examples.rewards.voting.Voting`, abstaining when the two orders disagree."""
        comparison = self.judge.compare([(prompt, response, reference)], seed=1000 * number)[0]
        return comparison.probability > 0.5 if comparison.consistent else None


# --- measuring ---------------------------------------------------------------------------------------------------


def agreement(judge: Judge, preferences: Sequence[Preference]) -> dict[str, Any]:
    """How often the judge prefers what was chosen, on pairs that it was not trained on.

    Returns "agreement" (a Score against the chance of one half; an even verdict counts half), "consistent" (share with the same
    verdict in both orders), "first" (mean probability of the first place over both orders: 0.5 is no bias), "finished" (share
    of rationales that came to a verdict).
    """
    if not preferences:
        raise UserError("agreement: there is no preference")
    compared = judge.compare([(p.prompt, p.chosen, p.rejected) for p in preferences])
    right = sum(1.0 if c.probability > 0.5 else 0.5 if c.probability == 0.5 else 0.0 for c in compared)
    count = len(compared)
    judgements = [judgement for c in compared for judgement in (c.forward, c.backward)]
    return {
        "agreement": share("agreement", right, count, 0.5),
        "consistent": sum(c.consistent for c in compared) / count,
        "first": sum(judgement.probability for judgement in judgements) / len(judgements),
        "finished": sum(judgement.finished for judgement in judgements) / len(judgements),
    }


def voting_agreement(judge: Judge, preferences: Sequence[Preference], votes: int) -> dict[str, Any]:
    """What voting adds (section 5.4.2): agreement of one sampled judgement, and of the majority of `votes`.

    The judge needs a temperature above 0; rationale and verdict are both drawn at it. Every other judgement is asked in the other order, so that a vote also averages out
    a liking for one place; every other pair begins with the other order, so that such a liking alone wins half of the votes.
    Returns "single" (a Score; each pair counts with the mean of its judgements), "voted" (a Score; a tie
    counts half), "unanimous" (share of pairs) and "votes".
    """
    if not preferences or votes < 1 or judge.temperature <= 0:
        raise UserError(
            f"voting: needs preferences, votes >= 1, temperature > 0; got {len(preferences)}, {votes}, {judge.temperature}"
        )
    ballots: list[list[bool]] = [[] for _ in preferences]  # whether each judgement prefers what was chosen
    for number in range(votes):
        swapped = [(number + index) % 2 == 1 for index in range(len(preferences))]
        triples = [
            (p.prompt, p.rejected, p.chosen) if swap else (p.prompt, p.chosen, p.rejected)
            for p, swap in zip(preferences, swapped, strict=True)
        ]
        judged = judge.judge(triples, seed=1_000_003 * number)
        draw = random.Random(number)
        for ballot, judgement, swap in zip(ballots, judged, swapped, strict=True):
            sharp = 1 / judge.temperature
            first, second = judgement.probability**sharp, (1 - judgement.probability) ** sharp
            ballot.append((draw.random() * (first + second) < first) != swap)
    winners = [vote(ballot).winner for ballot in ballots]
    count = len(preferences)
    return {
        "single": share("single", sum(map(sum, ballots)) / votes, count, 0.5),
        "voted": share("voted", sum(0.5 if w is None else float(w) for w in winners), count, 0.5),
        "unanimous": sum(len(set(ballot)) == 1 for ballot in ballots) / count,
        "votes": votes,
    }
