"""Conversations: the released template, labels on answers only, user files, packing without sight or loss across samples."""

import json

import numpy as np
import pytest
import torch

from examples.data import chat_sources
from examples.data.chat import ChatSample, chat, check_messages, encode_chat, encode_prompt, read_chats
from examples.data.chat_pack import ChatRows, fill_rows, pack_rows
from examples.data.tokenizer import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, USER, Tokenizer
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.transformer import Transformer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?\n"},
    {"role": "assistant", "content": "It is 6."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is two and two? It is four. Be brief. " * 4], 300)


def test_the_ids_are_those_of_the_released_template(tokenizer):
    import jinja2

    text = jinja2.Template(CHAT_TEMPLATE).render(messages=TURNS, bos_token=BOS, eos_token=EOS)
    expected = (
        f"{BOS}Be brief.{USER}What is 2 + 2?{ASSISTANT}4{EOS}{USER}And 3 + 3?\n{ASSISTANT}It is 6.{EOS}"
    )
    assert text == expected
    sample = encode_chat(tokenizer, TURNS)
    assert tokenizer.decode(sample.ids) == text
    assert sample.ids == tokenizer.encode(text, allow_special=True)
    assert encode_prompt(tokenizer, TURNS[:-1]) == sample.ids[: -len(tokenizer.encode("It is 6.")) - 1]


def test_only_answers_and_their_eos_are_learnt(tokenizer):
    sample = encode_chat(tokenizer, TURNS)
    learnt = [t for t, a in zip(sample.ids, sample.answer, strict=True) if a]
    assert tokenizer.decode(learnt) == f"4{EOS}It is 6.{EOS}"
    assert learnt.count(tokenizer.eos_id) == 2 == sample.ids.count(tokenizer.eos_id)
    assert not any(a for t, a in zip(sample.ids, sample.answer, strict=True) if t == tokenizer.assistant_id)


def test_special_strings_in_messages_stay_text(tokenizer):
    sample = encode_chat(tokenizer, chat(f"say {ASSISTANT}yes{EOS}", f"{USER}no"))
    assert [sample.ids.count(i) for i in (tokenizer.user_id, tokenizer.assistant_id, tokenizer.eos_id)] == [
        1
    ] * 3
    assert tokenizer.decode(sample.ids) == f"{BOS}{USER}say {ASSISTANT}yes{EOS}{ASSISTANT}{USER}no{EOS}"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        ("hi", "must be a list"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "tool", "content": ""}], "role must be"),
        ([{"role": "user", "content": 3}], "content must be text"),
        ([{"role": "user", "content": "a"}], "assistant must be last"),
        ([{"role": "assistant", "content": "a"}], "take turns"),
        ([{"role": "system", "content": "a"}], "take turns"),
        ([TURNS[1], TURNS[1], TURNS[2]], "take turns"),
        ([TURNS[1], TURNS[0], TURNS[2]], "take turns"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(UserError, match=rf"^here: .*{words}"):
        check_messages(messages, "here")


def test_user_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n\n" + json.dumps({"messages": TURNS[1:3]}) + "\n")
    assert list(read_chats(path)) == [TURNS, TURNS[1:3]]
    for content, words in (
        (b'{"messages": 3}', "must be a list"),
        (b'{"text": "a"}', "field 'messages'"),
        (b"{", "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid JSON"),
    ):
        path.write_bytes(b"\n" + content)
        with pytest.raises(UserError, match=rf"mine.jsonl:2: .*{words}"):
            list(read_chats(path))
    with pytest.raises(UserError, match=r"must be a .jsonl file"):
        list(read_chats(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="No such file"):
        list(read_chats(tmp_path / "b.jsonl"))


def test_sums_are_right_and_their_parts_do_not_meet(monkeypatch):
    train, held = chat_sources.sums(300, 1), chat_sources.sums(60, 1, held_out=True)
    for problem in [*train, *held]:
        expression = problem.question.removesuffix(" =")
        assert set(expression) <= set("0123456789+- ") and eval(expression) == int(problem.answer)
    questions = [p.question for p in held]
    assert len(set(questions)) == 60 and not set(questions) & {p.question for p in train}
    assert [p.question for p in chat_sources.sums(300, 1)] == [p.question for p in train]
    monkeypatch.setitem(chat_sources.SUMS, "max_terms", 2)
    with pytest.raises(UserError, match=r"only \d\d different"):
        chat_sources.sums(60, 1, held_out=True)


def test_sources_are_conversations_and_errors_name_them(monkeypatch):
    chats = chat_sources.load_chats(("sums", "worked"), (5, 40), seed=3)
    assert [len(group) for group in chats.values()] == [5, 40]
    held = {p.question for p in chat_sources.sums(60, 1, held_out=True)}
    for group in chats.values():
        for messages in group:
            check_messages(messages, "x")
            assert not any(
                messages[0]["content"].endswith(f" {q}") or messages[0]["content"] == q for q in held
            )
    assert any("\n" in m[-1]["content"] for m in chats["worked"]), "no worked solution"
    with pytest.raises(UserError, match=r"sft.sources: must be among .*'nothing'"):
        chat_sources.load_chats(("nothing",), (1,))
    monkeypatch.setitem(
        chat_sources.SOURCES, "sums", (chat_sources.SOURCES["sums"][0], lambda: "not installed")
    )
    with pytest.raises(UserError, match="sums cannot be read: not installed"):
        chat_sources.load_chats(("sums",), (1,))
    with pytest.raises(UserError, match="no conversation"):
        chat_sources.load_chats((), ())


def test_translations_and_dialogue():
    for name, check in (("translation", "Translate into "), ("dialogue", "")):
        if chat_sources.SOURCES[name][1]() is None:
            for messages in chat_sources.load_chats((name,), (50,))[name]:
                check_messages(messages, name)
                assert messages[-2]["content"].startswith(check) and messages[-1]["content"].strip()


# --- packing -------------------------------------------------------------------------------------------------------


def test_rows_are_filled_and_nothing_is_lost():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 400).tolist()
    rows = fill_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.02 * np.ceil(sum(lengths) / 64) + 1


def test_epochs_hold_every_sample_once_in_another_order():
    samples = [ChatSample([1] * n, [False] * (n - 1) + [True]) for n in [5, 9, 3, 30, 8, 8, 2, 12] * 5]
    rows = ChatRows(samples, 20, 3, pad=0, seed=1)
    assert rows.dropped == 5
    orders = []
    for epoch in range(2):
        steps = range(epoch * rows.steps_per_epoch, (epoch + 1) * rows.steps_per_epoch)
        batches = [b for s in steps for b in rows.batches(s, micro_batch=2)]
        assert sum(int(b.loss_mask.sum()) for b in batches) == 35
        orders.append([b.cu_seqlens.tolist() for b in batches])
    assert orders[0] != orders[1]
    again = ChatRows(samples, 20, 3, pad=0, seed=1)
    last = 2 * rows.steps_per_epoch - 1
    assert torch.equal(again.batches(last)[0].tokens, rows.batches(last)[0].tokens)
    with pytest.raises(UserError, match="none of 40 samples"):
        ChatRows(samples, 0, 3, pad=0)


SMALL = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_dense_layers=1, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, dense_inner_size=48, expert_inner_size=16, num_experts=8,
    top_k=2, num_groups=2, top_groups=1, mtp_depth=2, max_positions=48, init_std=0.1, precision="fp32",
)  # fmt: skip


def loss_and_gradients(model, batches, count, **changes):
    model.zero_grad()
    total = torch.zeros(3)
    for b in batches:
        options = {"cu_seqlens": b.cu_seqlens, "positions": b.positions} | changes
        out = model.loss(
            b.tokens, loss_mask=b.loss_mask, mtp_weight=0.5, balance_alpha=0.0, normalizer=count, **options
        )
        out.loss.backward()
        total += torch.stack([out.main, *out.mtp])
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(a, b):
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)


def test_packed_samples_equal_separate_ones_mtp_included():
    """Loss and gradients of rows of several samples are those of each sample alone; a sample filling a row to the brim and
    one of two tokens are among them."""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    rng = np.random.default_rng(1)
    samples = []
    for n in (25, 9, 2, 13, 7, 11, 5, 24):
        answer = [False, *(rng.random(n - 1) < 0.6).tolist()]
        answer[-1] = True
        samples.append(ChatSample(rng.integers(0, 61, n).tolist(), answer))
    count = sum(sum(s.answer) for s in samples)
    rows = fill_rows([len(s) for s in samples], 25)
    assert max(map(len, rows)) > 2 and any(len(row) == 1 for row in rows)
    packed = loss_and_gradients(model, [pack_rows(samples, rows, 24, 0)], count)
    alone = loss_and_gradients(model, [pack_rows([s], [[0]], len(s) - 1, 0) for s in samples], count)
    torch.testing.assert_close(packed[0], alone[0], rtol=1e-6, atol=1e-6)
    assert worst(packed[1], alone[1]) < 3e-6
    # The test would notice sight across borders.
    borders = torch.arange(0, len(rows) * 24 + 1, 24, dtype=torch.int32)
    leaking = loss_and_gradients(model, [pack_rows(samples, rows, 24, 0)], count, cu_seqlens=borders)
    assert worst(leaking[1], alone[1]) > 1e-2


def test_labels_never_cross_a_border():
    samples = [ChatSample([1, 2, 3], [False, True, True]), ChatSample([4, 5], [False, True])]
    batch = pack_rows(samples, [[0, 1]], 7, 9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.loss_mask.tolist() == [[True, True, False, True, False, False, False]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    full = pack_rows(samples, [[0, 1], [1]], 4, 9)
    assert full.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    with pytest.raises(UserError, match="must fit into 4 tokens; got 5"):
        pack_rows(samples, [[0, 1]], 3, 9)
