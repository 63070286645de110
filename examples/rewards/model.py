"""The model-based reward (report section 5.2.1): a judge, trained from the SFT checkpoint, that reasons before its verdict.

Its data are preferences with a rationale, "chain-of-thought leading to the reward", which makes it harder to game than a bare
score. There is no head and no Bradley-Terry loss: a preference becomes two chats, one for each order of the responses, in which
the assistant writes the rationale and then `Verdict: 1` or `Verdict: 2`. The SFT machinery trains on them as on any chat.

    bos JUDGE_SYSTEM <｜User｜> question, response 1, response 2 <｜Assistant｜> rationale  Verdict: 1 eos

To judge, the model writes a rationale, and the probability of `1` against `2` right after `Verdict: ` is the preference. Both
orders are asked and averaged, for models like the first response, or the second.

    preferences = read_preferences(path)                         # JSONL: prompt, chosen, rejected, rationale
    chats = [chat for p in preferences for chat in training_chats(p)]     # for the SFT stage
    judge = Judge(model, tokenizer)
    print(agreement(judge, held_out))
    reward = JudgeReward(judge)                                  # a rule like any other: reward(prompt, response, reference)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.data.files import disk_errors, write_atomic
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.evals.statistics import Score, wilson
from examples.evals.text_model import next_log_probabilities
from examples.model.transformer import Transformer
from examples.rollout.generate import generate

JUDGE_SYSTEM = (
    "You compare two responses to a question. First explain which is better and why, by correctness, then clarity, then "
    "brevity. Then write a last line: Verdict: 1 or Verdict: 2."
)
MARKER = "\nVerdict: "
FIELDS = ("prompt", "chosen", "rejected", "rationale")
_NAMES = ("Response 1", "Response 2")

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": ...}]


@dataclass(frozen=True)
class Preference:
    """rationale: why `chosen` is better; {chosen} and {rejected} in it become "Response 1" and "Response 2"."""

    prompt: str
    chosen: str
    rejected: str
    rationale: str


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
        found.append(Preference(**{name: record[name] for name in FIELDS}))
    if not found:
        raise UserError(f"{path}: there is no preference in it")
    return found


def write_preferences(path: Path, preferences: Iterable[Preference]) -> None:
    """To JSONL, whole or not at all."""
    lines = [json.dumps(asdict(preference), ensure_ascii=False) + "\n" for preference in preferences]
    write_atomic(path, "".join(lines).encode())


def judge_chat(prompt: str, first: str, second: str) -> Chat:
    """What the judge is asked."""
    question = f"Question:\n{prompt}\n\n{_NAMES[0]}:\n{first}\n\n{_NAMES[1]}:\n{second}"
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": question}]


def training_chats(preference: Preference) -> tuple[Chat, Chat]:
    """The chats to train on: the chosen response first, and second."""
    chats = []
    for place in (0, 1):
        responses = (preference.chosen, preference.rejected)[:: 1 - 2 * place]
        rationale = preference.rationale.replace("{chosen}", _NAMES[place]).replace(
            "{rejected}", _NAMES[1 - place]
        )
        answer = {"role": "assistant", "content": f"{rationale}{MARKER}{place + 1}"}
        chats.append([*judge_chat(preference.prompt, *responses), answer])
    return chats[0], chats[1]


def encode_chat(tokenizer: Tokenizer, chat: Chat, *, ask: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a chat in the released form, and which of them the assistant writes (its eos too): those that count in
    training. Content is data: special strings in it stay characters. ask: end where the assistant begins."""
    ids, counts = [tokenizer.bos_id], [False]
    for message in chat:
        content = tokenizer.encode(message["content"])
        role = message["role"]
        head = {"system": [], "user": [tokenizer.user_id], "assistant": [tokenizer.assistant_id]}.get(role)
        if head is None:
            raise UserError(f"chat: role must be system, user or assistant; got {role!r}")
        tail = [tokenizer.eos_id] if role == "assistant" else []
        ids += [*head, *content, *tail]
        counts += [False] * len(head) + [role == "assistant"] * (len(content) + len(tail))
    if ask:
        ids.append(tokenizer.assistant_id)
        counts.append(False)
    return ids, counts


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

    max_rationale: new tokens before it is asked for a verdict. temperature: 0 writes the most probable rationale; with another
    the seed makes votes differ (`examples.rewards.voting`).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_rationale: int = 128,
        temperature: float = 0.0,
        batch_size: int = 16,
    ) -> None:
        limit = model.config.max_positions
        if not 1 <= max_rationale < limit:
            raise UserError(f"judge: max_rationale must be 1 to {limit - 1}; got {max_rationale}")
        self.model, self.tokenizer = model, tokenizer
        self.max_rationale, self.temperature, self.batch_size = max_rationale, temperature, batch_size

    def compare(self, triples: Sequence[tuple[str, str, str]], seed: int = 0) -> list[Comparison]:
        """(prompt, first, second) each: is the first better?"""
        chats = [judge_chat(prompt, a, b) for prompt, a, b in triples]
        chats += [judge_chat(prompt, b, a) for prompt, a, b in triples]
        judged = self._judge([encode_chat(self.tokenizer, chat, ask=True)[0] for chat in chats], seed)
        pairs = zip(judged[: len(triples)], judged[len(triples) :], strict=True)
        return [Comparison((f.probability + 1 - b.probability) / 2, f, b) for f, b in pairs]

    def _judge(self, prompts: Sequence[list[int]], seed: int) -> list[Judgement]:
        room = self.model.config.max_positions - self.max_rationale - len(MARKER)
        for prompt in prompts:
            if len(prompt) > room:
                raise UserError(
                    f"judge: a question with its two responses may have {room} tokens (model.max_positions - max_rationale - "
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
    """Probability that the response is better than the reference, as a reward."""

    judge: Judge

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        return self.judge.compare([(prompt, response, reference)])[0].probability

    def vote(self, prompt: str, response: str, reference: str, number: int) -> bool | None:
        """A judgement for `examples.rewards.voting.Voting`, abstaining when the two orders disagree."""
        comparison = self.judge.compare([(prompt, response, reference)], seed=1000 * number)[0]
        return comparison.probability > 0.5 if comparison.consistent else None


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
        "agreement": Score("agreement", right / count, *wilson(right, count), count, 0.5),
        "consistent": sum(c.consistent for c in compared) / count,
        "first": sum(judgement.probability for judgement in judgements) / len(judgements),
        "finished": sum(judgement.finished for judgement in judgements) / len(judgements),
    }
