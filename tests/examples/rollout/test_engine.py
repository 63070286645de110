"""The engine: what it answers is what plain generation answers, whoever joins, leaves, shares, or is preempted."""

import random

import pytest
import torch

from examples.errors import UserError
from examples.rollout.engine import Engine, EngineConfig
from examples.rollout.generate import generate
from examples.rollout.request import QueueFull
from examples.rollout.sampling import Sampling


def prompts_of(seed, count, longest=100, vocabulary=97, shared=()):
    rng = random.Random(seed)
    return [
        [*shared, *(rng.randrange(vocabulary) for _ in range(rng.randint(1, longest)))] for _ in range(count)
    ]


def all_free(engine):
    """No page is held, each is free or resting exactly once, and nobody is left."""
    pool = engine.pool
    pages = sorted([*pool._free, *pool._resting])
    return (
        not engine.running
        and not engine.waiting
        and pages == list(range(pool.total))
        and not any(pool.counts)
    )


def greedy(model, prompts, new):
    return [generate(model, [prompt], new).tokens[0] for prompt in prompts]


MODES = [
    {"invariance": "none"},
    {"invariance": "attention"},
    {"invariance": "full"},
    {"speculative": True},
    {"invariance": "full", "speculative": True},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equals_plain_greedy_with_joins_leaves_preemption_and_shared_prefixes(engine_model, mode):
    common = [random.Random(9).randrange(97) for _ in range(70)]
    prompts = prompts_of(1, 6) + prompts_of(2, 6, 50, shared=common)
    news = [random.Random(n).randint(15, 40) for n in range(len(prompts))]
    engine = Engine(engine_model, EngineConfig(pages=5, max_running=5, pass_tokens=74, **mode))
    requests = []
    for prompt, new in zip(prompts, news, strict=True):  # they come while others run
        requests.append(engine.submit(prompt, Sampling(new)))
        engine.step()
    while engine.step():
        pass
    for request, prompt, new in zip(requests, prompts, news, strict=True):
        assert request.answer == greedy(engine_model, [prompt], new)[0]
        assert request.finish == "length" and len(request.logprobs) == new
    assert engine.stats["preemptions"] > 0 and engine.stats["shared_tokens"] > 0
    assert all_free(engine)
    if mode.get("speculative"):
        assert engine.stats["drafts"] > 0


def sampled(seed, new=16, **more):
    return Sampling(new, temperature=1.0, top_p=0.95, top_k=40, seed=seed, **more)


@pytest.mark.parametrize("speculative", [False, True])
def test_full_invariance_to_the_last_bit(engine_model, speculative):
    """Alone, or among neighbours that share its prefix, fill its pages and have it preempted: equal logprobs, not close."""
    common = [random.Random(9).randrange(97) for _ in range(128)]
    prompt = [*common, 5, 6, 7]
    config = EngineConfig(pages=8, max_running=6, pass_tokens=80, invariance="full", speculative=speculative)
    (alone,) = Engine(engine_model, config).run([prompt], sampled(3, 70))
    engine = Engine(engine_model, config)
    engine.run([[*common, 5, 9]], sampled(1))  # its pages are shared
    prompts = [*prompts_of(5, 4, 60), prompt, *prompts_of(6, 2, 60)]
    requests = engine.run(
        prompts, [sampled(n, 60) for n in range(4)] + [sampled(3, 70)] + [sampled(7, 60)] * 2
    )
    among = requests[4]
    assert among.shared_tokens == 128 and among.preemptions > 0
    assert among.answer == alone.answer
    assert among.logprobs == alone.logprobs
    assert (
        among.drafts == alone.drafts and bool(alone.drafts) == speculative
    )  # MTP's pages are as true as the main model's


@pytest.mark.parametrize("invariance", ["none", "attention", "full"])
def test_random_neighbours_do_not_change_what_is_sampled(engine_model, invariance):
    """Decisive choices: rounding is not enough to change one, and nothing but rounding reaches a neighbour."""
    prompt, config = [5, 6, 7, 8], EngineConfig(invariance=invariance)
    (alone,) = Engine(engine_model, config).run([prompt], sampled(3))
    for trial in range(4):
        prompts = [*prompts_of(trial, 1 + trial), prompt, *prompts_of(trial + 50, 3 - trial)]
        wanted = [sampled(3 if p is prompt else trial) for p in prompts]
        engine = Engine(engine_model, config)
        among = engine.run(prompts, wanted)[1 + trial]
        assert among.answer == alone.answer
        assert among.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_speculation_changes_passes_and_nothing_else(engine_model):
    """Greedy and sampled; a draft that is always right halves the passes, one that never is costs none."""
    prompts = prompts_of(3, 5, 70)
    wanted = [Sampling(21), *(sampled(n, 21) for n in range(4))]
    plain = Engine(engine_model).run(prompts, wanted)
    engine = Engine(engine_model, EngineConfig(speculative=True))
    drafted = engine.run(prompts, wanted)
    assert [r.answer for r in drafted] == [r.answer for r in plain]
    for oracle, passes in ((True, 11), (False, 21)):
        engine = Engine(engine_model, EngineConfig(speculative=True))
        answers = {tuple(p): r.tokens for p, r in zip(prompts, plain, strict=True)}
        real = engine._draft

        def draft(work, confirmed, hidden, *, real=real, answers=answers, oracle=oracle, **options):
            real(work, confirmed, hidden, **options)
            for part in work:
                request = part.request
                if request.draft is not None:
                    right = answers[tuple(request.tokens[: request.prompt_length])][len(request.tokens)]
                    request.draft = right if oracle else (right + 1) % 97

        engine._draft = draft
        assert [r.answer for r in engine.run(prompts, wanted)] == [r.answer for r in plain]
        assert engine.stats["passes"] == passes
        assert engine.stats["accepted"] == (engine.stats["drafts"] if oracle else 0)


def test_a_shared_prefix_is_computed_once(engine_model):
    common = [random.Random(4).randrange(97) for _ in range(150)]
    engine = Engine(engine_model)
    engine.run([[*common, 1]], Sampling(4))
    before = engine.stats["computed_tokens"]
    requests = engine.run([[*common, n] for n in range(5)], Sampling(2))
    assert all(r.shared_tokens == 128 for r in requests)
    assert engine.stats["computed_tokens"] - before == 5 * (151 - 128 + 1)
    # Answers to one prompt that come together read it once too, and hold up nobody else.
    fresh = [random.Random(5).randrange(97) for _ in range(150)]
    before = engine.stats["computed_tokens"]
    group = engine.run([fresh] * 6 + [[7] * 9], [sampled(n, 2) for n in range(7)])
    assert [r.shared_tokens for r in group] == [0] + [128] * 5 + [0]
    assert engine.stats["computed_tokens"] - before == 151 + 5 * (150 - 128 + 1) + 10
    assert group[6].first_token < group[1].first_token
    # An answer's full pages serve the next turn.
    (first,) = engine.run([[3] * 40], Sampling(60))
    (second,) = engine.run([[*first.tokens, 4]], Sampling(1))
    assert second.shared_tokens == 64
    off = Engine(engine_model, EngineConfig(share_prefixes=False))
    assert sum(r.shared_tokens for r in off.run([[*common, 1]] * 2, Sampling(2))) == 0


def test_only_what_is_computed_is_shared(engine_model):
    """An answer's last token was never read: the page that it fills is not full, and must not be found."""
    engine = Engine(engine_model)
    (first,) = engine.run([[3] * 60], Sampling(4))
    assert len(first.tokens) == 64
    (second,) = engine.run([[*first.tokens, 4]], Sampling(6))
    assert second.shared_tokens == 0
    assert second.answer == greedy(engine_model, [[*first.tokens, 4]], 6)[0]


def test_pages_with_drafts_are_shared_only_if_the_next_token_is_equal(engine_model):
    """MTP's latent at a page's last position depends on the token after the page; the main model's does not."""
    common = [random.Random(6).randrange(97) for _ in range(64)]
    for speculative, shared in ((False, [0, 64, 64]), (True, [0, 0, 64])):
        engine = Engine(engine_model, EngineConfig(speculative=speculative))
        prompts = [[*common, 1, 1], [*common, 2, 2], [*common, 2, 3]]
        requests = [engine.run([prompt], Sampling(2))[0] for prompt in prompts]
        assert [r.shared_tokens for r in requests] == shared


def test_logprobs_are_the_models_own(engine_model):
    """Temperature and nucleus shape the choice, not what is reported."""
    prompt = [5, 6, 7]
    (request,) = Engine(engine_model).run([prompt], sampled(2, 6))
    full = torch.log_softmax(engine_model.logits(torch.tensor([request.tokens]))[0].detach(), -1)
    theirs = [float(full[2 + n, token]) for n, token in enumerate(request.answer)]
    assert request.logprobs == pytest.approx(theirs, abs=1e-4)


def test_stop_tokens_and_strings(text_model, tokenizer):
    engine = Engine(text_model, tokenizer=tokenizer)
    prompt = tokenizer.encode("the cat sat")
    (free,) = engine.run([prompt], Sampling(40))
    (stopped,) = engine.run([prompt], Sampling(40, stop_tokens=frozenset({free.answer[7]})))
    end = free.answer.index(free.answer[7]) + 1
    assert stopped.answer == free.answer[:end] and stopped.finish == "stop"
    text = "".join(c.text for c in free.chunks)
    assert text == tokenizer.decode(free.answer, skip_special=True)
    for at in (0, 5, 17):
        for size in (1, 3, 8):
            stop = text[at : at + size]
            request = engine.submit(prompt, Sampling(40, stop=("never there", stop)))
            shown = ""
            for chunk in engine.stream(request):
                shown += chunk.text
                assert stop not in shown and text.startswith(shown)
            assert shown == text[: text.index(stop)] and request.finish == "stop"
    assert all_free(engine)


def test_cancelled_and_late_requests_leave_and_their_pages_are_free(engine_model):
    engine = Engine(engine_model, EngineConfig(pages=4, max_running=2))
    first, second, third = (engine.submit([1] * 60, Sampling(60)) for _ in range(3))
    for _ in range(3):
        engine.step()
    assert engine.pool.held > 0 and third in engine.waiting
    engine.cancel(first)
    engine.cancel(third)
    engine.step()
    assert (first.finish, second.finish, third.finish) == ("cancelled", None, "cancelled")
    late = engine.submit([2], Sampling(60, deadline=1e-9))
    while engine.step():
        pass
    assert late.finish == "deadline" and second.finish == "length" and late.answer == []
    for chunk in engine.stream(engine.submit([3], Sampling(60))):  # a reader who goes
        assert chunk.tokens
        break
    assert engine.stats["finished_cancelled"] == 3
    assert all_free(engine)


@pytest.mark.parametrize(
    ("count", "mode"),
    [(1000, {}), (150, {"speculative": True}), (150, {"invariance": "full", "speculative": True})],
)
def test_nothing_leaks_in_a_thousand_random_requests(count, mode):
    """A hail of joins, cancellations, deadlines, shared prefixes, preemptions; then every page is free."""
    from tests.examples.rollout.conftest import make_model

    model = make_model(32, num_layers=1, num_dense_layers=1, hidden_size=32, dense_inner_size=32)
    rng = random.Random(0)
    stems = [[rng.randrange(32) for _ in range(rng.choice((0, 64, 100)))] for _ in range(6)]
    engine = Engine(model, EngineConfig(pages=9, max_running=8, max_waiting=20, pass_tokens=128, **mode))
    made, alive = 0, []
    while made < count:
        try:
            prompt = [*rng.choice(stems), *(rng.randrange(32) for _ in range(rng.randint(1, 20)))]
            deadline = 1e-4 if rng.random() < 0.05 else None
            new = rng.choice((1, 1, 2, 3, 30))
            alive.append(engine.submit(prompt, Sampling(new, temperature=1.0, seed=made, deadline=deadline)))
            made += 1
        except QueueFull:
            engine.step()
        if alive and rng.random() < 0.15:
            engine.cancel(rng.choice(alive))
    while engine.step():
        assert engine.pool.held == len({page for r in engine.running for page in r.pages})
    assert all(r.finish for r in alive) and all_free(engine)
    assert sum(engine.stats[f"finished_{reason}"] for reason in ("length", "cancelled", "deadline")) == count
    for event in ("preemptions", "finished_cancelled", "finished_deadline", "shared_tokens"):
        assert engine.stats[event] > 0, event
    assert engine.pool.evictions > 0


def test_a_fault_ends_every_request_and_says_so(engine_model):
    engine = Engine(engine_model)
    request = engine.submit([1], Sampling(3))
    engine._choose = lambda work, hidden: [[(0, float("nan"))]]
    engine.step()
    assert request.finish == "error" and "not finite" in request.error and all_free(engine)
    request = engine.submit([1], Sampling(3))
    engine.fail("the machine burns")
    assert (request.finish, request.error) == ("error", "the machine burns") and all_free(engine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Engine(m).submit([], Sampling(3)), "prompt: must have 1 to 253 tokens .256 positions"),
        (lambda m: Engine(m).submit([1] * 254, Sampling(3)), "got 254"),
        (lambda m: Engine(m, EngineConfig(pages=1)).submit([1] * 62, Sampling(3)), "64 positions minus"),
        (lambda m: Engine(m).submit([97], Sampling(3)), r"tokens must be in \[0, 97\); got 97"),
        (
            lambda m: Engine(m).submit([1], Sampling(3, stop=("x",))),
            "stop: strings need an engine with a tokenizer",
        ),
        (lambda m: EngineConfig(max_running=0), "max_running: must be at least 1; got 0"),
        (lambda m: EngineConfig(pass_tokens=10), "pass_tokens: must be at least 2"),
        (lambda m: EngineConfig(invariance="some"), "invariance: must be none, attention or full"),
        (lambda m: Sampling(0), "max_tokens: must be at least 1; got 0"),
        (lambda m: Sampling(1, temperature=float("nan")), "temperature: must be in .0, 100.; got nan"),
        (lambda m: Sampling(1, top_p=0.0), "top_p: must be in"),
        (lambda m: Sampling(1, stop=("",)), "stop: must be at most 16 strings"),
        (lambda m: Sampling(1, deadline=0.0), "deadline: must be seconds above 0"),
    ],
)
def test_errors(engine_model, call, message):
    with pytest.raises(UserError, match=message):
        call(engine_model)


def test_a_full_queue_is_an_error_and_stays_usable(engine_model):
    engine = Engine(engine_model, EngineConfig(max_waiting=2))
    requests = [engine.submit([1], Sampling(2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="holds at most 2 requests and is full"):
        engine.submit([1], Sampling(2))
    while engine.step():
        pass
    assert [r.finish for r in requests] == ["length"] * 2
    assert [r.answered for r in engine.run([[1]] * 5, Sampling(2))] == [2] * 5  # waits for room


def test_speculation_needs_mtp():
    from tests.examples.rollout.conftest import make_model

    with pytest.raises(UserError, match="mtp_depth"):
        Engine(make_model(32, mtp_depth=0), EngineConfig(speculative=True))
