"""Cached decoding in the absorbed form equals the full forward pass."""

import pytest
import torch

from deepseek_ops import ArgumentError
from examples.model.cache import PAGE

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=["plain", "yarn", "no_q_lora"])
def model(ref, request):
    return ref.model(ref.config(mtp_depth=2, **{"max_positions": 256, **ref.variants[request.param]})).eval()


def full(model, tokens):
    with torch.no_grad():
        return model.logits(tokens)


def test_token_by_token_across_pages(ref, model):
    tokens = ref.tokens(2, PAGE + 9)
    want = full(model, tokens)
    cache = model.new_cache(2, 2 * PAGE)
    start = PAGE - 4
    out = model.prefill(tokens[:, :start], cache)
    got = [out.logits]
    for i in range(start, tokens.shape[1]):
        got.append(model.decode_step(tokens[:, i : i + 1], cache).logits)
    assert ref.relative(torch.cat(got, 1), want[:, start - 1 :]) < TOLERANCE
    assert cache.lengths[0].tolist() == [PAGE + 9] * 2


def test_several_tokens_per_step(ref, model):
    tokens = ref.tokens(2, 30)
    want = full(model, tokens)
    cache = model.new_cache(2, 64)
    model.prefill(tokens[:, :10], cache)
    at = 10
    for count in (2, 8, 1, 3):
        out = model.decode_step(tokens[:, at : at + count], cache)
        assert ref.relative(out.logits, want[:, at : at + count]) < TOLERANCE
        at += count


def test_prompts_of_different_lengths(ref, model):
    tokens = ref.tokens(3, 20)
    lengths = torch.tensor([5, 17, 1])
    cache = model.new_cache(3, 40)
    out = model.prefill(tokens, cache, lengths)
    again = torch.stack([full(model, tokens[i : i + 1, :n])[0, -1] for i, n in enumerate(lengths)])
    assert ref.relative(out.logits[:, 0], again) < TOLERANCE
    new = ref.tokens(3, 1, seed=9)
    out = model.decode_step(new, cache)
    for i, n in enumerate(lengths):
        row = torch.cat([tokens[i, :n], new[i]])[None]
        assert ref.relative(out.logits[i, 0], full(model, row)[0, -1]) < TOLERANCE


def test_drafts_equal_the_mtp_modules(ref, model):
    """Depth 1 and 2 chained step by step give the logits of the whole-sequence MTP pass."""
    tokens = ref.tokens(2, 24)
    with torch.no_grad():
        first, second = model.mtp_logits(tokens)
    cache = model.new_cache(2, 64)
    out = model.prefill(tokens[:, :12], cache)
    # After a prompt of 12, depth 1 holds positions 0..10 and depth 2 holds 0..9: each waits for the token it needs.
    assert [int(n[0]) for n in cache.lengths] == [12, 11, 10]
    hidden, before = out.hidden, out.mtp_hidden[0]
    for i in range(12, 24):
        one = model.mtp_draft(hidden, tokens[:, i : i + 1], cache)
        two = model.mtp_draft(before, tokens[:, i : i + 1], cache, depth=2)
        assert ref.relative(one.logits[:, 0], first[:, i - 1]) < TOLERANCE
        assert ref.relative(two.logits[:, 0], second[:, i - 2]) < TOLERANCE
        hidden, before = model.decode_step(tokens[:, i : i + 1], cache).hidden, one.hidden


def test_rejected_drafts_leave_no_trace(ref, model):
    """Write garbage, truncate row by row, go on: as if it had never been written."""
    tokens = ref.tokens(2, 20)
    want = full(model, tokens)
    cache = model.new_cache(2, 64)
    hidden = model.prefill(tokens[:, :10], cache).hidden
    garbage = ref.tokens(2, 4, seed=5)
    model.decode_step(garbage, cache)
    model.mtp_draft(hidden, garbage[:, :1], cache)
    cache.truncate(torch.tensor([10, 10]))
    cache.truncate(torch.tensor([9, 9]), depth=1)
    out = model.decode_step(tokens[:, 10:14], cache)
    assert ref.relative(out.logits, want[:, 10:14]) < TOLERANCE
    cache.truncate(torch.tensor([11, 13]))  # rows may keep different lengths
    step = torch.stack([tokens[0, 11], tokens[1, 13]])[:, None]
    out = model.decode_step(step, cache)
    assert ref.relative(out.logits[0, 0], want[0, 11]) < TOLERANCE
    assert ref.relative(out.logits[1, 0], want[1, 13]) < TOLERANCE
    with torch.no_grad():
        ahead = model.mtp_logits(tokens)[0]
    draft = model.mtp_draft(hidden, tokens[:, 10:11], cache)
    assert ref.relative(draft.logits[:, 0], ahead[:, 9]) < TOLERANCE


def test_finished_sequences_can_leave(ref, model):
    tokens = ref.tokens(3, 12)
    want = full(model, tokens)
    cache = model.new_cache(3, 20)
    model.prefill(tokens[:, :11], cache)
    cache.keep(torch.tensor([2, 0]))
    out = model.decode_step(tokens[[2, 0], 11:12], cache)
    assert ref.relative(out.logits[:, 0], want[[2, 0], 11]) < TOLERANCE
    assert cache.batch_size == 2


def test_decoding_does_not_count_tokens_for_the_routing_bias(ref, model):
    before = model.expert_counts()
    cache = model.new_cache(1, 20)
    model.prefill(ref.tokens(1, 5), cache)
    model.decode_step(ref.tokens(1, 1), cache)
    assert torch.equal(model.expert_counts(), before)


def test_errors_name_what_is_wrong(ref, model):
    tokens = ref.tokens(2, 12)
    cache = model.new_cache(2, 12)
    with pytest.raises(ArgumentError, match=r"tokens: must have shape \[2, \*\]; got shape \(1, 12\)"):
        model.prefill(tokens[:1], cache)
    with pytest.raises(ArgumentError, match=r"lengths: must be in \[1, 12\]; got \[0, 3\]"):
        model.prefill(tokens, cache, torch.tensor([0, 3]))
    with pytest.raises(ArgumentError, match="cache: holds at most 12 tokens per sequence; got 13"):
        model.prefill(ref.tokens(2, 13), cache)
    model.prefill(tokens, cache)
    with pytest.raises(ArgumentError, match="cache: prefill needs an empty one"):
        model.prefill(tokens, cache)
    with pytest.raises(ArgumentError, match="cache: holds at most 12 tokens per sequence; got 13"):
        model.decode_step(tokens[:, :1], cache)
    with pytest.raises(ArgumentError, match=r"tokens.shape\[1\]: must be in \[1, 8\]; got 9"):
        model.decode_step(tokens[:, :9], cache)
    with pytest.raises(ArgumentError, match="depth: must be in"):
        model.mtp_draft(torch.zeros(2, 1, 64), tokens[:, :1], cache, depth=3)
    assert cache.lengths[0].tolist() == [12, 12]  # refused steps wrote nothing


def test_a_cache_without_drafts_holds_the_main_model_alone(ref, model):
    tokens = ref.tokens(2, 12)
    with_drafts, without = (model.new_cache(2, 64, drafts=drafts) for drafts in (True, False))
    assert (with_drafts.depths, without.depths) == (2, 0)
    assert len(with_drafts.pages) - len(without.pages) == 2
    want, have = model.prefill(tokens, with_drafts), model.prefill(tokens, without)
    assert torch.equal(have.logits, want.logits) and have.mtp_hidden == []
    with pytest.raises(ArgumentError, match="cache: mtp_draft needs one made with drafts=True"):
        model.mtp_draft(have.hidden, tokens[:, :1], without)
