"""The three questions against brute force: one sequence at a time, all logits, token by token."""

from types import SimpleNamespace

import pytest
import torch

from examples.errors import UserError
from examples.evals.lm_eval_adapter import Adapter, lm_eval_model
from examples.evals.text_model import cut, next_log_probabilities, rolling_windows, score_continuations


@torch.no_grad()
def brute(model, context, continuation):
    """Log-probability and greediness, one token at a time."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        log_p = torch.log_softmax(
            model.logits(torch.tensor([ids[-model.config.max_positions :]]))[0, -1].double(), -1
        )
        total, greedy = total + float(log_p[token]), greedy and int(log_p.argmax()) == token
        ids.append(token)
    return total, greedy


PAIRS = [("In the beginning", " God created"), ("", "And the earth"), ("17 + 25? ", "42"), ("a", "b"), ("Größe", " 日本"),
         ("def area(", "width, height):\n"), ("In ", "  the")]  # fmt: skip


def test_loglikelihood_is_that_of_each_token_in_turn(text_model):
    tokenizer = text_model.tokenizer
    scores = text_model.loglikelihood(PAIRS)
    for (context, continuation), (value, greedy) in zip(PAIRS, scores, strict=True):
        whole = tokenizer.encode(context + continuation)
        head = tokenizer.encode(context.rstrip(" "))
        expected = brute(text_model.model, [tokenizer.bos_id, *head], whole[len(head) :])
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy is expected[1]


def test_greedy_continuations_are_recognised(text_model):
    prompt = "In the beginning"
    ids = [text_model.tokenizer.bos_id, *text_model.tokenizer.encode(prompt)]
    new = []
    for _ in range(3):
        new.append(int(text_model.model.logits(torch.tensor([ids + new]))[0, -1].argmax()))
    wrong = [*new[:2], (new[2] + 1) % text_model.tokenizer.vocab_size]
    scores = score_continuations(text_model.model, [(ids, new), (ids, wrong)])
    assert [greedy for _, greedy in scores] == [True, False] and scores[0][0] > scores[1][0]


def test_probabilities_of_all_next_tokens_sum_to_one(text_model):
    prompts = [[0, 5, 9], [0]]
    log_p = next_log_probabilities(text_model.model, prompts)
    assert log_p.exp().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)
    for row, prompt in zip(log_p, prompts, strict=True):
        pairs = [(prompt, [token]) for token in range(0, text_model.tokenizer.vocab_size, 50)]
        assert [value for value, _ in score_continuations(text_model.model, pairs)] == pytest.approx(
            row[::50].tolist(), abs=1e-4
        )


@torch.no_grad()
def test_a_long_context_loses_its_beginning(text_model):
    model = text_model.model  # 32 positions
    context, continuation = list(range(10, 60)), [7, 8, 9]
    ((value, _),) = score_continuations(model, [(context, continuation)])
    kept = (context + continuation)[-33:]
    log_p = torch.log_softmax(model.logits(torch.tensor([kept[:-1]]))[0].double(), -1)
    assert value == pytest.approx(sum(float(log_p[-3 + i, continuation[i]]) for i in range(3)), abs=1e-4)
    whole = list(range(32))
    assert score_continuations(model, [([0], whole)])[0][0] < 0  # a continuation as long as the model's limit
    with pytest.raises(UserError, match=r"pair 1: .* continuation of 1 to 32 tokens .*; got 1 and 33"):
        score_continuations(model, [([0], [1]), ([0], list(range(33)))])
    with pytest.raises(UserError, match="got 0 and 1"):
        score_continuations(model, [([], [1])])


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 65, 100])
def test_rolling_windows_predict_each_token_once(length):
    tokens = list(range(1000, 1000 + length))
    windows = rolling_windows(tokens, 0, 32)
    assert [token for _, predicted in windows for token in predicted] == tokens
    whole, at = [0, *tokens], 0
    for context, predicted in windows:
        assert context and len(context) + len(predicted) <= 33
        assert list(context) == whole[at + 1 - len(context) : at + 1]  # what stands right before it
        at += len(predicted)
    if length > 32:
        assert len(windows[-1][0]) + len(windows[-1][1]) == 33  # the last is filled up with context


@torch.no_grad()
def test_rolling_loglikelihood(text_model):
    tokenizer, model = text_model.tokenizer, text_model.model
    texts = ["In the beginning God created the heaven and the earth. " * 3, "Short.", ""]
    values = text_model.loglikelihood_rolling(texts)
    for text, value in zip(texts, values, strict=True):
        ids, expected = [tokenizer.bos_id, *tokenizer.encode(text)], 0.0
        for start in range(0, len(ids) - 1, 32):  # windows of 32 predicted tokens
            count = min(32, len(ids) - 1 - start)
            fed = ids[max(0, start + count - 32) : start + count]
            log_p = torch.log_softmax(model.logits(torch.tensor([fed]))[0].double(), -1)
            for k in range(count):
                expected += float(log_p[len(fed) - count + k, ids[start + 1 + k]])
        assert value == pytest.approx(expected, abs=1e-3)
    assert values[2] == 0.0


def test_generation_stops_before_its_stop_strings(text_model):
    prompts = ["In the beginning", "", "def area(width, height): return the secret number of Utopia " * 3]
    free = text_model.generate_until(prompts, (), 8)
    for prompt, text in zip(prompts, free, strict=True):
        ids = [text_model.tokenizer.bos_id, *text_model.tokenizer.encode(prompt)][-24:]
        new = []
        while len(new) < 8 and text_model.tokenizer.eos_id not in new:
            new.append(int(text_model.model.logits(torch.tensor([ids + new]))[0, -1].argmax()))
        assert text == text_model.tokenizer.decode(new, skip_special=True)
    stop = next(text for text in free if len(text) > 3)[2:4]
    assert text_model.generate_until(prompts, (stop,), 8) == [text.split(stop)[0] for text in free]
    assert text_model.generate_until(prompts, (), 8, temperature=1.0, seed=1) != free
    with pytest.raises(UserError, match="max_new_tokens: must be 1 to 31; got 32"):
        text_model.generate_until(prompts, (), 32)


def test_cut():
    assert cut("a b c", ("c", " b")) == "a"
    assert cut("abc", ()) == cut("abc", ("", "x")) == "abc"
    assert cut("stop here", ("stop",)) == ""


# --- lm-eval -------------------------------------------------------------------------------------------------------


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_the_adapters_methods_are_the_models(text_model):
    adapter = Adapter(text_model)
    assert adapter.loglikelihood(requests(*PAIRS)) == text_model.loglikelihood(PAIRS)
    assert adapter.loglikelihood_rolling(requests(("In the",))) == text_model.loglikelihood_rolling(
        ["In the"]
    )
    free = text_model.generate_until(["In the", "a", "b"], (), 6)
    asked = requests(
        ("In the", {"until": [], "max_gen_toks": 6, "temperature": 0.0, "do_sample": False}),
        ("a", {"until": free[1][1:2], "max_gen_toks": 6}),
        ("b", {"max_gen_toks": 3}),
    )
    said = adapter.generate_until(asked)
    assert said[:2] == [free[0], free[1].split(free[1][1:2])[0]]
    assert said[2] == text_model.generate_until(["b"], (), 3)[0]
    sampled = adapter.generate_until(
        requests(("In the", {"max_gen_toks": 6, "temperature": 1.5, "do_sample": True}))
    )
    assert sampled == text_model.generate_until(["In the"], (), 6, temperature=1.5)
    with pytest.raises(UserError, match=r"options must be of .*; got num_beams"):
        adapter.generate_until(requests(("a", {"num_beams": 2})))


def test_lm_eval_runs_a_task_on_it(text_model):
    """A task of our own through lm-eval's evaluator gives what the model says directly."""
    pytest.importorskip("lm_eval", reason="the optional package lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    lm = lm_eval_model(text_model)
    assert isinstance(lm, LM)
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(PAIRS)
    ]
    assert lm.loglikelihood(instances) == text_model.loglikelihood(PAIRS)
    task = {"until": ["\n"], "max_gen_toks": 4}
    instance = Instance(request_type="generate_until", doc={}, arguments=("In the", task), idx=0)
    assert lm.generate_until([instance]) == text_model.generate_until(["In the"], ("\n",), 4)


def test_lm_eval_missing_is_said(text_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="lm-eval: is not installed"):
        lm_eval_model(text_model)
