"""The training loss: the report's equations 17 to 25, masks, packed documents, and micro-batches that add up."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_ops import ArgumentError


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ref, ours, theirs, tolerance=2e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ref.relative(ours[name], theirs[name]) < tolerance, name


def test_mtp_loss_as_the_report_prints_it(ref):
    """Depth k sums over T - k positions and divides by T (eq. 24); lambda / D times the sum over depths (eq. 25)."""
    model = ref.model(ref.config(mtp_depth=2))
    tokens = ref.tokens(2, 21)
    rows, length = 2, 20
    out = model.loss(tokens, mtp_weight=0.3, balance_alpha=0.0)
    logits = model.logits(tokens[:, :-1])
    main = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    total = main
    for k, ahead in enumerate(model.mtp_logits(tokens[:, :-1]), 1):
        assert ahead.shape == (rows, length - k, model.config.vocab_size)
        target = tokens[:, 1 + k :]
        depth = F.cross_entropy(ahead.flatten(0, 1), target.flatten(), reduction="sum") / (rows * length)
        assert ref.relative(out.mtp[k - 1], depth) < 1e-5
        total = total + 0.3 / 2 * depth
    assert ref.relative(out.main, main) < 1e-5
    assert ref.relative(out.loss, total) < 1e-5
    same_gradients(ref, gradients(model, out.loss), gradients(model, total))


def test_balance_loss_as_the_report_prints_it(ref):
    """Equations 17 to 20, per sequence and expert by expert, over every MoE layer and the MTP module."""
    alpha = 0.01
    model = ref.model(ref.config())
    tokens = ref.tokens(3, 18)
    out = model.loss(tokens, mtp_weight=0.1, balance_alpha=alpha)
    record = []
    model(tokens[:, :-1], record=record)
    want = 0.0
    e, k = model.config.num_experts, model.config.top_k
    for routing in record:
        for row in range(3):
            s = routing.scores[row * 17 : (row + 1) * 17]
            chosen = routing.topk_idx[row * 17 : (row + 1) * 17]
            for i in range(e):
                f = e / (k * 17) * float((chosen == i).sum())
                p = (s[:, i] / s.sum(1)).sum() / 17
                want = want + alpha * f * p / 3
    without = model.loss(tokens, mtp_weight=0.0, balance_alpha=alpha)
    assert ref.relative(without.balance, want) < 1e-5
    assert float(out.balance) > float(without.balance)  # the MTP module's experts are balanced too
    assert ref.relative(out.loss, out.main + 0.1 * out.mtp[0] + out.balance) < 1e-6
    grads = gradients(model, without.balance * 0 + without.loss)
    assert grads["layers.1.ffn.router.weight"].abs().sum() > 0


def test_counts_are_the_tokens_per_expert(ref):
    model = ref.model(ref.config())
    out = model.loss(ref.tokens(2, 16))
    assert out.counts.dtype == torch.int64 and out.counts.shape == (3, 16)
    assert out.counts.sum(1).tolist() == [2 * 15 * 4, 2 * 15 * 4, 2 * 14 * 4]


def test_masked_labels_do_not_count(ref):
    model = ref.model(ref.config())
    tokens = ref.tokens(2, 13)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) > 0.4
    out = model.loss(tokens, loss_mask=mask, mtp_weight=0.5, balance_alpha=0.0, per_token=True)
    nll = F.cross_entropy(model.logits(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    assert ref.relative(out.nll, nll * mask) < 1e-5
    assert ref.relative(out.main, (nll * mask).sum() / mask.sum()) < 1e-5
    ahead = F.cross_entropy(
        model.mtp_logits(tokens[:, :-1])[0].transpose(1, 2), tokens[:, 2:], reduction="none"
    )
    assert ref.relative(out.mtp[0], (ahead * mask[:, 1:]).sum() / mask.sum()) < 1e-5


def test_packed_documents_equal_separate_ones(ref):
    """Losses and all gradients, MTP included; each document's last label is masked, as the loader does."""
    model = ref.model(ref.config(mtp_depth=2))
    lengths = [9, 2, 14, 1, 6]
    documents = [ref.tokens(1, n, seed=n) for n in lengths]
    total = sum(lengths)
    tokens = torch.cat([*documents, ref.tokens(1, 1)], dim=1)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = torch.ones(1, total, dtype=torch.bool)
    mask[0, borders[1:].long() - 1] = False
    options = {"mtp_weight": 0.4, "balance_alpha": 0.0, "normalizer": 10.0}
    packed = model.loss(tokens, cu_seqlens=borders, positions=positions, loss_mask=mask, **options)
    alone = [model.loss(document, **options) for document in documents if document.shape[1] > 1]
    assert ref.relative(packed.main, sum(out.main for out in alone)) < 1e-5
    for k in range(2):
        assert ref.relative(packed.mtp[k], sum(out.mtp[k] for out in alone)) < 1e-5
    same_gradients(ref, gradients(model, packed.loss), gradients(model, sum(out.loss for out in alone)))


def test_packed_rows_in_a_batch(ref):
    """Borders run over all rows; a row's tail is cut per row, not per batch, for MTP."""
    model = ref.model(ref.config())
    tokens = ref.tokens(2, 13)
    borders = torch.tensor([0, 5, 12, 19, 24], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (5, 7, 7, 5)]).view(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 4] = mask[1, 6] = False
    options = {"balance_alpha": 0.0, "normalizer": 1.0}
    both = model.loss(tokens, cu_seqlens=borders, positions=positions, loss_mask=mask, **options)
    rows = []
    for row, inside in ((0, [0, 5, 12]), (1, [0, 7, 12])):
        part = slice(row, row + 1)
        cu = torch.tensor(inside, dtype=torch.int32)
        rows.append(
            model.loss(
                tokens[part], cu_seqlens=cu, positions=positions[part], loss_mask=mask[part], **options
            )
        )
    assert ref.relative(both.loss, rows[0].loss + rows[1].loss) < 1e-5
    assert ref.relative(both.mtp[0], rows[0].mtp[0] + rows[1].mtp[0]) < 1e-5


def test_nothing_crosses_a_document_border(ref):
    """Not a value and, exactly, not a gradient: the first document's tokens are ids below 40, the second's above."""
    model = ref.model(ref.config())
    tokens = ref.tokens(1, 20) % 40
    tokens[0, 8:] += 45
    changed = tokens.clone()
    changed[0, :8] = (tokens[0, :8] + 7) % 40
    borders = torch.tensor([0, 8, 20], dtype=torch.int32)
    ours, other = (model(x, cu_seqlens=borders)[0, 8:] for x in (tokens, changed))
    assert torch.allclose(ours, other, atol=1e-5)  # not bit for bit: experts' GEMMs have other sizes
    ours.square().sum().backward()
    assert not model.embed.weight.grad[:40].any() and model.embed.weight.grad[45:].any()
    leaky, leaky_changed = (model(x)[0, 8:] for x in (tokens, changed))
    assert not torch.allclose(leaky, leaky_changed, atol=1e-2)


def test_micro_batches_add_up(ref):
    """With the whole batch's count as normalizer, uneven micro-batches give its loss and gradient exactly."""
    model = ref.model(ref.config())
    tokens = ref.tokens(6, 17)
    whole = model.loss(tokens, balance_alpha=0.02)
    parts = [model.loss(part, balance_alpha=0.02, normalizer=6 * 16) for part in tokens.split([1, 3, 2])]
    total = sum(part.loss for part in parts)
    assert ref.relative(total, whole.loss) < 1e-6
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    same_gradients(ref, gradients(model, total), gradients(model, whole.loss))


def test_wrong_inputs_are_named(ref):
    model = ref.model(ref.config())
    tokens = ref.tokens(2, 9)
    bad = [
        ({"tokens": tokens.int()}, "tokens: must be int64; got int32"),
        ({"tokens": tokens[0]}, r"tokens: must have 2 dimension\(s\); got shape \(9,\)"),
        ({"tokens": tokens[:, :1]}, r"tokens: must be \[B, S \+ 1\]"),
        ({"tokens": tokens + 90}, r"tokens: must be in \[0, 97\); got 1\d\d"),
        ({"tokens": tokens - 97}, r"tokens: must be in \[0, 97\); got -"),
        ({"tokens": ref.tokens(1, 66)}, "rows must be at most max_positions = 64 long; got 65"),
        ({"positions": torch.zeros(2, 9, dtype=torch.int64)}, r"positions: must have shape \[2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 8, 16])}, "cu_seqlens: must be int32; got int64"),
        ({"loss_mask": torch.ones(2, 9, dtype=torch.bool)}, r"loss_mask: must have shape \[2, 8\]"),
    ]
    for change, message in bad:
        arguments = {"tokens": tokens, **change}
        with pytest.raises(ArgumentError, match=message):
            model.loss(arguments.pop("tokens"), **arguments)


def test_an_empty_batch_is_legal(ref):
    out = ref.model(ref.config()).loss(torch.zeros(0, 9, dtype=torch.int64), normalizer=1.0)
    assert float(out.loss.detach()) == 0.0 and out.counts.sum() == 0
