"""The judge: data, chats, probabilities against a hand computation, and agreement that training raises."""

import json
import random
from dataclasses import replace

import pytest
import torch

from examples.configs import get_config
from examples.data.chat import encode_chat, encode_prompt
from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rewards import model as judging
from examples.rewards.model import (
    JUDGE_SYSTEM,
    MARKER,
    Judge,
    JudgeReward,
    Preference,
    agreement,
    judge_chat,
    read_preferences,
    training_chats,
    write_preferences,
)
from examples.rewards.voting import Voting

PAIR = Preference("What is 2 + 2?", "It is 4.", "Who knows?", "{chosen} answers, {rejected} does not.")


def make_pairs(count, seed):
    """What can be learnt in seconds: a response that says something is better than one that does not."""
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        a, b = rng.randrange(10, 99), rng.randrange(10, 99)
        good = rng.choice(["It is {}.", "The sum is {}."]).format(a + b)
        pairs.append(
            replace(PAIR, prompt=f"{a}+{b}?", chosen=good, rejected=rng.choice(["No idea.", "Ask me later."]))
        )
    return pairs


@pytest.fixture(scope="module")
def tokenizer():
    chats = [chat for pair in make_pairs(200, 0) for chat in training_chats(pair)]
    return Tokenizer.train(["".join(message["content"] + "\n" for message in chat) for chat in chats], 480)


def make_model(tokenizer, **changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 64, "num_layers": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "dense_inner_size": 128, "expert_inner_size": 32,
        "num_experts": 4, "num_groups": 2, "top_groups": 1, "top_k": 2, "mtp_depth": 0, "init_std": 0.06, "precision": "fp32",
    }  # fmt: skip
    return Transformer(replace(get_config("tiny").model, **{**shape, **changes})).eval()


def train(model, tokenizer, pairs, steps):
    """A stand-in for the SFT stage: AdamW on the assistant's tokens."""
    samples = [encode_chat(tokenizer, chat) for pair in pairs for chat in training_chats(pair)]
    encoded = [(sample.ids, sample.answer) for sample in samples]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    rng = random.Random(0)
    for step in range(steps):
        batch = rng.sample(encoded, 16)
        longest = max(len(ids) for ids, _ in batch)
        tokens = torch.zeros(16, longest, dtype=torch.int64)
        mask = torch.zeros(16, longest - 1, dtype=torch.bool)
        for row, (ids, counts) in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids) - 1] = torch.tensor(counts[1:])
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 10) * (1 - step / (1.2 * steps))
        model.loss(tokens, loss_mask=mask, mtp_weight=0, balance_alpha=0).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# --- data ----------------------------------------------------------------------------------------------------------


def test_preferences_survive_the_file(tmp_path):
    pairs = [PAIR, replace(PAIR, prompt="Größe?\n\u2028")]
    write_preferences(tmp_path / "p.jsonl", pairs)
    assert read_preferences(tmp_path / "p.jsonl") == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not valid JSON"),
        ('{"prompt": "a", "chosen": "b", "rationale": 3}', ":2: needs the strings .*; missing rejected, rationale"),
        ("[]", ":2: needs the strings"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b", "rationale": ""}', ":2: chosen and rejected must differ; got 'b'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "rationale": "x\\nVerdict: 1"}', ":2: a rationale must not contain"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "rationale": "d"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_preferences(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="there is no preference"):
        read_preferences(path)


def test_a_pair_becomes_both_orders():
    first, second = training_chats(PAIR)
    assert [m["role"] for m in first] == ["system", "user", "assistant"]
    assert first[0]["content"] == JUDGE_SYSTEM
    assert first[1]["content"] == "Response 1: It is 4.\n\nResponse 2: Who knows?\n\nWhat is 2 + 2?"
    assert first[2]["content"] == "Response 1 answers, Response 2 does not.\nVerdict: 1"
    assert second[1]["content"] == "Response 1: Who knows?\n\nResponse 2: It is 4.\n\nWhat is 2 + 2?"
    assert second[2]["content"] == "Response 2 answers, Response 1 does not.\nVerdict: 2"
    assert training_chats(PAIR, "Judge.")[0][0]["content"] == "Judge."


# --- judging -------------------------------------------------------------------------------------------------------


def test_a_verdict_is_the_probability_of_its_token(tokenizer):
    """Against the whole computation by hand: greedy rationale, marker, softmax over the two verdicts, both orders."""
    model = make_model(tokenizer)
    judge = Judge(model, tokenizer, max_rationale=6, batch_size=3)
    triples = [
        (PAIR.prompt, PAIR.chosen, PAIR.rejected),
        ("Why?", "So.", "Because it is so, and so it is."),
        ("x", "y", "z"),
    ]
    compared = judge.compare(triples)
    for (prompt, a, b), comparison in zip(triples, compared, strict=True):
        expected = []
        for first, second in ((a, b), (b, a)):
            ids = encode_prompt(tokenizer, judge_chat((prompt, first, second))[:-1])
            new = []
            while len(new) < 6 and tokenizer.eos_id not in new:
                new.append(int(model.logits(torch.tensor([ids + new]))[0, -1].argmax()))
            text = tokenizer.decode(new, skip_special=True).partition(MARKER)[0].replace("\ufffd", "")
            verdicts = [tokenizer.encode(text + MARKER + v) for v in "12"]
            logits = model.logits(torch.tensor([ids + verdicts[0][:-1]]))[0, -1].double()
            expected.append(torch.softmax(logits[[v[-1] for v in verdicts]], 0)[0].item())
        assert comparison.forward.probability == pytest.approx(expected[0], abs=1e-6)
        assert comparison.backward.probability == pytest.approx(expected[1], abs=1e-6)
        assert comparison.probability == pytest.approx((expected[0] + 1 - expected[1]) / 2, abs=1e-6)
    swapped = judge.compare([(prompt, b, a) for prompt, a, b in triples])
    for one, other in zip(compared, swapped, strict=True):  # no order is preferred
        assert one.probability == pytest.approx(1 - other.probability, abs=1e-6)


def test_the_rationale_ends_at_its_marker(tokenizer, monkeypatch):
    """Whatever comes after the first verdict is not the rationale; without a verdict the model is asked for one."""
    written = ["Response 1 answers.\nVerdict: 1", "No.\nVerdict: 2\nVerdict: 1", "Still thinking", ""]
    fed = []

    def fake_generate(model, prompts, *_args, **_options):
        group = [written[len(fed) + number] for number in range(len(prompts))]
        fed.extend(group)
        return type("G", (), {"tokens": [[*tokenizer.encode(text), tokenizer.eos_id] for text in group]})

    def fake_log_p(model, prompts):
        asked.extend(
            tokenizer.decode(prompt[prompt.index(tokenizer.assistant_id) + 1 :]) for prompt in prompts
        )
        return torch.zeros(len(prompts), tokenizer.vocab_size)

    asked = []
    monkeypatch.setattr(judging, "generate", fake_generate)
    monkeypatch.setattr(judging, "next_log_probabilities", fake_log_p)
    triples = [("a", "b", "c"), ("a", "b", "d")]
    compared = Judge(make_model(tokenizer), tokenizer, max_rationale=20).compare(triples)
    judged = [j for c in compared for j in (c.forward, c.backward)]
    assert sorted(j.rationale for j in judged) == ["", "No.", "Response 1 answers.", "Still thinking"]
    assert sum(j.finished for j in judged) == 2
    assert sorted(asked) == sorted(j.rationale + MARKER for j in judged)
    assert all(c.probability == 0.5 for c in compared)


def test_training_raises_agreement_on_held_out_pairs(tokenizer):
    model, held_out = make_model(tokenizer), make_pairs(40, 1)
    judge = Judge(model, tokenizer, max_rationale=24)
    before = agreement(judge, held_out)
    train(model, tokenizer, make_pairs(200, 0), 70)
    after = agreement(judge, held_out)
    assert before["agreement"].near_chance and before["finished"] == 0.0
    assert after["agreement"].value >= 0.9 and not after["agreement"].near_chance
    assert after["finished"] > 0.9
    reward = JudgeReward(judge)
    pair = held_out[0]
    good, bad = (
        reward(pair.prompt, *order) for order in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))
    )
    assert good > 0.5 > bad and good == pytest.approx(1 - bad, abs=1e-5)
    assert Voting(reward.vote, votes=1)(pair.prompt, pair.chosen, pair.rejected) in (0.5, 1.0)


def test_errors(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(UserError, match="max_rationale must be 1 to 255; got 256"):
        Judge(model, tokenizer, max_rationale=256)
    with pytest.raises(UserError, match=r"may have \d+ tokens .*; got \d+"):
        Judge(model, tokenizer, max_rationale=200).compare([("word " * 100, "a", "b")])
    with pytest.raises(UserError, match="there is no preference"):
        agreement(Judge(model, tokenizer), [])
