"""Generation: cached equals recomputed, speculative equals greedy, batches do not matter, errors are clear."""

from dataclasses import replace

import pytest
import torch

from examples.configs import get_config
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import generate, sample
from examples.rollout.speculative import generate_speculative


@pytest.fixture(scope="module")
def model():
    """A random tiny model whose weights are large enough for decisive choices."""
    torch.manual_seed(0)
    config = replace(get_config("tiny").model, vocab_size=97, init_std=0.08, precision="fp32")
    return Transformer(config).eval()


PROMPTS = [[5, 6, 7], [11], list(range(20, 60)), [3] * 9]


def greedy_by_recomputing(model, prompt, new):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_cached_greedy_equals_recomputing_everything(model):
    result = generate(model, PROMPTS, 12)
    assert result.tokens == [greedy_by_recomputing(model, prompt, 12) for prompt in PROMPTS]
    assert result.steps == 11


def test_speculative_equals_greedy_whatever_the_drafts(model):
    plain = generate(model, PROMPTS, 30)
    drafted = generate_speculative(model, PROMPTS, 30)
    assert drafted.tokens == plain.tokens
    assert drafted.drafts > 0 and drafted.steps >= plain.steps / 2


def test_finished_rows_leave_the_batch(model, monkeypatch):
    plain = generate(model, PROMPTS, 30)
    eos = plain.tokens[0][3]
    sizes, step = [], type(model).decode_step
    monkeypatch.setattr(
        type(model), "decode_step", lambda self, t, cache: sizes.append(t.shape[0]) or step(self, t, cache)
    )
    drafted = generate_speculative(model, PROMPTS, 30, eos=eos)
    assert drafted.tokens == [t[: t.index(eos) + 1] if eos in t else t for t in plain.tokens]
    assert sizes[0] == len(PROMPTS) > sizes[-1]


def test_speculation_saves_passes_when_drafts_are_right(model, monkeypatch):
    """A draft head that knows the answer: every draft is accepted and the passes halve; one that never does costs none."""
    plain = generate(model, PROMPTS, 21)
    real = type(model).mtp_draft
    for oracle in (True, False):
        after = {}
        for prompt, new in zip(PROMPTS, plain.tokens, strict=True):
            for i in range(len(new) - 1):
                after[tuple(prompt), i] = new[i + 1]
        state = {"at": [0] * len(PROMPTS)}

        def draft(self, hidden, next_token, cache, depth=1, oracle=oracle, state=state, after=after):
            output = real(self, hidden, next_token, cache, depth)
            output.logits.zero_()
            for row, prompt in enumerate(PROMPTS):
                # Place of the last confirmed token among the new ones, from what the main cache holds.
                at = int(cache.lengths[0][row]) - len(prompt)
                answer = after.get((tuple(prompt), at), 0)
                output.logits[row, :, answer if oracle else (answer + 1) % 97] = 1.0
            return output

        monkeypatch.setattr(type(model), "mtp_draft", draft)
        drafted = generate_speculative(model, PROMPTS, 21)
        assert drafted.tokens == plain.tokens
        assert drafted.acceptance == (1.0 if oracle else 0.0)
        assert drafted.steps == (10 if oracle else 20)


def test_eos_ends_a_row_and_only_that_row(model):
    free = generate(model, PROMPTS, 20)
    eos = free.tokens[0][4]
    for run in (generate, generate_speculative):
        stopped = run(model, PROMPTS, 20, eos=eos)
        for tokens, whole in zip(stopped.tokens, free.tokens, strict=True):
            end = whole.index(eos) + 1 if eos in whole else len(whole)
            assert tokens == whole[:end]


def test_a_prompt_does_not_feel_its_neighbours(model):
    together = generate(model, PROMPTS, 15)
    alone = [generate(model, [prompt], 15).tokens[0] for prompt in PROMPTS]
    assert together.tokens == alone


def test_sampling_is_seeded_and_respects_top_p(model):
    one, same, other = (generate(model, PROMPTS, 10, temperature=1.0, seed=s).tokens for s in (1, 1, 2))
    assert one == same and one != other
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sample(logits, 1.0, 0.6, generator)) for _ in range(200)}
    assert drawn == {0, 1}  # 0.5 < 0.6 <= 0.5 + 0.3
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(logits, 1.0, 1.0, generator)] += 1
    torch.testing.assert_close(counts / 4000, logits.exp()[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, [], 3), "prompts: must hold at least one"),
        (lambda m: generate(m, [[1], []], 3), "prompt 1: must have 1 to 253 tokens"),
        (lambda m: generate(m, [[1] * 300], 3), "got 300"),
        (lambda m: generate(m, [[1]], 0), "max_new_tokens: must be at least 1; got 0"),
        (lambda m: generate(m, [[1]], 3, temperature=-1), "temperature, top_p"),
    ],
)
def test_errors(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_speculation_needs_mtp():
    config = replace(get_config("tiny").model, vocab_size=32, mtp_depth=0)
    with pytest.raises(UserError, match="mtp_depth"):
        generate_speculative(Transformer(config).eval(), [[1]], 2)


def test_a_model_that_has_generated_can_still_be_trained():
    """Nothing that generation keeps (tables, plans) belongs to inference mode."""
    torch.manual_seed(0)
    model = Transformer(replace(get_config("tiny").model, vocab_size=97))
    for run in (generate, generate_speculative):
        run(model, PROMPTS, 3)
        model.loss(torch.randint(0, 97, (2, 16)), mtp_weight=0.3, balance_alpha=1e-4).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
