"""The final evaluation: rows against hand computations, finished pairs are kept over a stop, what cannot be done says why."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from examples.configs import get_config, parse_overrides
from examples.configs.benchmarks import BenchmarksConfig
from examples.data.chat import chat, encode_prompt
from examples.data.chat_sources import sums
from examples.errors import UserError
from examples.evals.perplexity import text_score
from examples.evals.statistics import ratio
from examples.evals.text_model import TextModel
from examples.rollout.generate import generate
from examples.run import main
from examples.stages import benchmarks
from examples.stages.benchmarks import Tasks, table
from examples.stages.stage import Context
from examples.stages.tokenize import open_data
from examples.train.runner import start_weights

from ..train.conftest import MICRO
from .conftest import MICRO_BENCHMARKS

SETTINGS = [
    *MICRO,
    "train.schedule.total_tokens=512",
    "sft.start=pretrain",
    "sft.sources=sums",
    "grpo.task=sums",
    "grpo.eval_prompts=12",
    "sft.counts=40",
    *MICRO_BENCHMARKS,
]
ARGUMENTS = ["tiny", "--threads", "1", *SETTINGS]
CONFIG = parse_overrides(get_config("tiny"), SETTINGS)
NO_SANDBOX = "sandbox: no protection works here"


class NoSandbox:
    def __init__(self):
        raise UserError(NO_SANDBOX)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run folder with a base model and a fine-tuned one."""
    root = tmp_path_factory.mktemp("benchmarks") / "run"
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "tokenize,pretrain,sft"]) == 0
    return root


@pytest.fixture(scope="module")
def found(started):
    """Result of the stage where there is no sandbox."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "Sandbox", NoSandbox)
        context = Context(started, "benchmarks", CONFIG)
        context.folder.mkdir()
        return benchmarks.run(context)


def row(found, model, task):
    return next(r for r in found["scores"] if (r["model"], r["task"]) == (model, task))


def test_every_score_has_items_interval_and_chance(found):
    assert found["models"] == ["pretrain", "sft"] and found["absent"] == ["extend", "grpo", "distill"]
    asked = {(r["model"], r["task"]) for r in found["scores"]}
    assert asked == {(m, t) for m in ("pretrain", "sft") for t in CONFIG.benchmarks.tasks}
    for r in found["scores"]:
        if r["task"] == "code":
            assert r["why"] == NO_SANDBOX
            continue
        assert r["low"] <= r["value"] <= r["high"] and r["count"] >= 1 and r["chance"] > 0
        assert r["unit"] == ("bits/byte" if r["task"] == "text" else "share")
    assert row(found, "sft", "cloze")["chance"] == 0.25 and row(found, "sft", "cloze")["count"] == 3
    json.dumps(found, allow_nan=False)


def test_models_are_asked_in_their_own_form(started, monkeypatch):
    """The base in the corpus' words, the other in a chat; either way the answers are checked exactly."""
    tokenizer, _, readers = open_data(started)
    model = start_weights(started / "sft").build().eval()
    problems = sums(12, 0, held_out=True)
    right = {p.question: p.answer for p in problems}
    monkeypatch.setattr(
        benchmarks,
        "chat_answers",
        lambda text, questions, new: [right[q] if q != problems[0].question else "x" for q in questions],
    )
    said = {f"Question: {q}\nAnswer:": answer for q, answer in right.items()}
    monkeypatch.setattr(
        TextModel, "generate_until", lambda self, prompts, *a: [f" {said[p]}\nQuestion: 9" for p in prompts]
    )
    tasks = Tasks(CONFIG, tokenizer, readers)
    (of_chat,), (of_base,) = (tasks.scores("verified", model, is_chat=is_chat) for is_chat in (True, False))
    assert of_chat["value"] == pytest.approx(11 / 12) and of_base["value"] == 1.0
    assert of_chat["samples"][0]["said"] == "x"
    most = max(list(right.values()).count(answer) for answer in right.values())
    assert of_chat["chance"] == pytest.approx(most / 12)


def test_a_chat_is_answered_as_its_model_would(started):
    """Against generation of each prompt alone, on fp32 weights."""
    tokenizer = open_data(started)[0]
    weights = start_weights(started / "sft")
    model = replace(weights, config=replace(weights.config, precision="fp32")).build().eval()
    questions = [p.question for p in sums(3, 0, held_out=True)]
    text = TextModel(model, tokenizer, batch_size=2)
    for question, answer in zip(questions, benchmarks.chat_answers(text, questions, 3), strict=True):
        ids = encode_prompt(tokenizer, chat(question, "")[:1])
        alone = generate(model, [ids], 3, eos=tokenizer.eos_id).tokens[0]
        assert answer == tokenizer.decode(alone, skip_special=True)


def test_bits_per_byte_by_hand(started, found):
    tokenizer, _, readers = open_data(started)
    model = start_weights(started / "sft").build().eval()
    documents = Tasks(CONFIG, tokenizer, readers).documents
    text = TextModel(model, tokenizer, batch_size=1)
    bits, size, count = 0.0, 0, 0
    for group in documents.values():
        for document in group:
            ids = document[:40]
            log_p = model.logits(torch.tensor([[tokenizer.bos_id, *ids]]))[0].detach().log_softmax(-1)
            bits -= sum(float(log_p[i, token]) for i, token in enumerate(ids)) / math.log(2)
            size += sum(len(tokenizer.bytes_of(i)) for i in ids)
            count += len(ids)
    r = row(found, "sft", "text")
    assert r["value"] == pytest.approx(bits / size, rel=2e-3)  # bf16
    assert r["chance"] == pytest.approx(math.log2(tokenizer.vocab_size) * count / size)
    assert r["near_chance"] == (r["high"] >= r["chance"]) and r["sources"].keys() == readers.keys()
    with pytest.raises(UserError, match="none of them empty"):
        text_score(text, {"a": [[]]})


def test_finished_pairs_are_kept_and_others_done_again(started, found, tmp_path, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(started, root)
    context = Context(root, "benchmarks", CONFIG)
    scores = context.folder / "scores"
    kept = scores / "sft.text.json"
    record = json.loads(kept.read_text())
    record["scores"][0]["value"] = 123.0  # shows that it is read, not computed
    kept.write_text(json.dumps(record))
    (scores / "sft.verified.json").unlink()
    other = scores / "pretrain.text.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"checkpoint": "of another model"}))
    asked = []

    def record_scores(self, task, model, *, is_chat):
        asked.append((task, is_chat))
        return [{"name": task, "why": "only asked"}]

    monkeypatch.setattr(Tasks, "scores", record_scores)
    again = benchmarks.run(context)
    # what was missing, of another checkpoint, or could not be done for want of a sandbox; nothing else
    assert sorted(asked) == [("code", False), ("code", True), ("text", False), ("verified", True)]
    assert row(again, "sft", "text")["value"] == 123.0
    assert row(again, "sft", "cloze") == row(found, "sft", "cloze")
    kept.write_text("{")
    with pytest.raises(UserError, match=r"sft.text.json: must be a record of this stage"):
        benchmarks.run(context)


def test_code_runs_where_there_is_a_sandbox(started, monkeypatch):
    """With a sandbox that passes what adds: pass@k counts problems, and says what they are."""

    class Everything:
        protection = type("P", (), {"level": "fake"})

    monkeypatch.setattr(benchmarks, "Sandbox", Everything)
    monkeypatch.setattr(
        benchmarks.humaneval, "run_tests", lambda sandbox, program, tests: ("add" in program, None)
    )
    tokenizer, _, readers = open_data(started)
    tasks = Tasks(CONFIG, tokenizer, readers)
    (r,) = tasks.scores("code", start_weights(started / "sft").build().eval(), is_chat=True)
    assert r["name"] == "code pass@1" and r["value"] == pytest.approx(1 / 6) and r["count"] == 6
    assert r["own"] is True and r["samples"] == 1 and r["sandbox"] == "fake"


def test_a_table_marks_what_guessing_explains(found):
    text = table(found["scores"], found["models"])
    (line,) = [line for line in text.splitlines() if line.strip().startswith("needle")]
    assert line.count("~") == sum(r["near_chance"] for r in found["scores"] if r["task"] == "needle")
    assert text.count("not done") == 2 and text.count(NO_SANDBOX) == 2


def test_users_files_are_read_before_any_work(started, tmp_path):
    tokenizer, _, readers = open_data(started)
    for key in ("code_problems", "choice_questions"):
        config = parse_overrides(CONFIG, [f"benchmarks.{key}={tmp_path / 'nothing.jsonl'}"])
        with pytest.raises(UserError, match=r"nothing\.jsonl"):
            Tasks(config, tokenizer, readers)
    with pytest.raises(UserError, match=r"benchmarks.models: none of grpo has finished"):
        config = parse_overrides(CONFIG, ["benchmarks.models=grpo"])
        benchmarks.run(Context(started, "benchmarks", config))


def test_the_interval_of_a_ratio():
    """Against its definition on equal denominators, where it is that of a mean; and it shrinks with the square root of n."""
    values = [1.0, 2.0, 4.0, 5.0]
    value, low, high = ratio(values, [2.0] * 4)
    spread = math.sqrt(sum((v / 2 - 1.5) ** 2 for v in values) / 3 / 4)
    assert value == 1.5 and high - value == pytest.approx(1.959964 * spread, rel=1e-6) == value - low
    many = ratio(values * 100, [2.0] * 400)
    assert (many[2] - many[1]) / (high - low) == pytest.approx(math.sqrt(3 / 399), rel=1e-6)
    for bad in (([1.0], [1.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(UserError, match="ratio: needs 2 items or more"):
            ratio(*bad)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("text", "chess")}, "benchmarks.tasks: must be among .*; got 'chess'"),
        ({"models": ()}, "benchmarks.models: must hold at least one"),
        ({"code_k": 11}, "benchmarks.code_k: must be at most benchmarks.code_samples = 10; got 11"),
        ({"cloze": 0}, "benchmarks.cloze: must be at least 1; got 0"),
        ({"needle_depths": (2.0,)}, r"benchmarks.needle_depths: must be in \[0, 1\]"),
        ({"code_temperature": 0.0}, "benchmarks.code_temperature: must be positive"),
    ],
)
def test_limits(values, message):
    with pytest.raises(UserError, match=message):
        BenchmarksConfig(**values)
    assert BenchmarksConfig(needles=1).quick().needles == 1
