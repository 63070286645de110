"""bench.trl_baseline: both sides get the same tokens and labels, turns are counted right, and where trl is here, both agree."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import trl_baseline
from bench.beside_trl.grpo import trl_inputs
from bench.beside_trl.sft import packed_rows, padded_steps
from bench.beside_trl.turns import Turns
from bench.transformers_baseline import build, hf_views_of
from examples.configs import get_config
from examples.data.chat import ChatSample
from examples.data.chat_pack import ChatRows
from examples.model.hf import to_hf_state_dict
from examples.rollout.group import Rollout

from ..examples.train.conftest import MICRO

PAD = 2


# ---- what both sides get ---------------------------------------------------------------------------------------------


def samples() -> list[ChatSample]:
    """Of 3 to 16 tokens, no two alike, the last 2 tokens learnt; rows of 17 hold one or many of them, one exactly full."""
    lengths = [17, 16, 3, 9, 8, 5, 4, 7, 6, 3, 11, 13]
    return [
        ChatSample([100 * i + j + 3 for j in range(n)], [False] * (n - 2) + [True] * 2)
        for i, n in enumerate(lengths)
    ]


def test_trl_gets_the_tokens_and_labels_of_our_rows() -> None:
    rows = ChatRows(samples(), 16, 2, pad=PAD, seed=3)
    steps = rows.steps_per_epoch
    packed = packed_rows(rows, steps)
    wanted = {tuple(s.ids): s.answer for s in samples()}
    seen = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 17
        for a, b in itertools.pairwise(itertools.accumulate(row["seq_lengths"], initial=0)):
            ids = tuple(row["input_ids"][a:b])
            seen.append(ids)
            assert row["labels"][a:b] == [t if n else -100 for t, n in zip(ids, wanted[ids], strict=True)]
    assert sorted(seen) == sorted(wanted)
    learnt = [sum(label != -100 for label in row["labels"]) for row in packed]
    assert [sum(learnt[2 * i : 2 * i + 2]) for i in range(steps)] == [
        int(rows.batches(step)[0].loss_mask.sum()) for step in range(steps)
    ]


def test_a_padded_step_holds_the_samples_of_its_rows() -> None:
    packed = packed_rows(ChatRows(samples(), 16, 2, pad=PAD), 2)
    steps = padded_steps(packed, 2)
    assert len(steps) == 2
    for step, rows in zip(steps, (packed[:2], packed[2:4]), strict=True):
        assert [len(ids) for ids in step["input_ids"]] == [n for row in rows for n in row["seq_lengths"]]
        for key in ("input_ids", "labels"):
            chained = itertools.chain.from_iterable
            assert list(chained(step[key])) == list(chained(row[key] for row in rows))


def test_a_batch_of_rollouts_as_trl_has_it() -> None:
    routes = torch.zeros(0)
    outputs = [
        Rollout([5, 6, 7], [8], True, torch.tensor([-1.0]), routes),
        Rollout([9], [4, 3], False, torch.tensor([-2.0, -3.0]), routes),
    ]
    old = [o.logprobs for o in outputs]
    batch = trl_inputs(outputs, torch.tensor([0.5, -0.5]).double(), old, [2 * x for x in old], PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "prompt_ids": [[5, 6, 7], [PAD, PAD, 9]],
        "prompt_mask": [[1, 1, 1], [0, 0, 1]],
        "completion_ids": [[8, PAD], [4, 3]],
        "completion_mask": [[1, 0], [1, 1]],
        "advantages": [0.5, -0.5],
        "old_per_token_logps": [[-1.0, 0.0], [-2.0, -3.0]],
        "ref_per_token_logps": [[-2.0, 0.0], [-4.0, -6.0]],
    }


def test_transformers_model_by_the_names_of_a_checkpoint() -> None:
    config = replace(get_config("tiny").model, hidden_size=32, num_layers=2, mtp_depth=0, vocab_size=64)
    ours, theirs = build(config)
    state, views = to_hf_state_dict(ours), hf_views_of(theirs.state_dict())
    assert state.keys() == views.keys()
    assert all(torch.equal(views[name], tensor) for name, tensor in state.items())
    name = next(name for name in views if name.endswith("experts.3.up_proj.weight"))
    views[name].zero_()  # a view, not a copy
    fused = theirs.state_dict()[name.replace("3.up_proj.weight", "gate_up_proj")]
    inner = config.expert_inner_size
    assert not fused[3, inner:].any() and fused[3, :inner].any() and fused[2].all(-1).any()


def test_what_one_side_lacks_is_off() -> None:
    config = trl_baseline.settings(get_config("tiny"), "fp32", 9)
    assert (
        config.model.mtp_depth
        == config.sft.mtp_weight
        == config.sft.balance_alpha
        == config.sft.bias_speed
        == 0
    )
    assert (config.model.precision, config.train.moments, config.grpo.max_new_tokens) == ("fp32", "fp32", 9)
    assert (config.grpo.updates, config.grpo.minibatches, config.grpo.normalization) == (1, 1, "grpo")


# ---- counting --------------------------------------------------------------------------------------------------------


def test_rates_leave_the_first_turns_out() -> None:
    turns = Turns(1)
    turns.times = {"ours": [9.0, 9.0, 1.0, 2.0, 4.0], "trl": [0.1, 0.1, 2.0, 8.0, 4.0]}
    turns.tokens = {"ours": [100] * 5, "trl": [100, 100, 100, 80, 100]}
    summary = turns.summary()
    assert (summary["ours_tokens_per_s"], summary["trl_tokens_per_s"]) == (50.0, 25.0)
    assert summary["ratios"] == [
        2.0,
        5.0,
        1.0,
    ]  # tokens per second, as the two may differ in how many they had
    assert (summary["ratio"], summary["ratio_worst_turn"], summary["turns"]) == (2.0, 1.0, 3)


def test_a_callback_gives_each_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(
        [0.0, 5.0, 6.0, 6.5, 10.5, 12.5, 12.5]
    )  # begin; after trl's step, after ours, ours done; the same again
    turns = Turns(1)
    monkeypatch.setattr(turns, "clock", lambda: next(now))
    callback = turns.callback(lambda: {"lr": 0.5, "loss": 3.0})
    callback.on_train_begin()
    for _ in range(2):
        callback.on_step_end()
        callback.on_log(logs={"loss": 3.5})
    callback.on_log(logs={"train_runtime": 1.0})
    assert turns.times == {"trl": [5.0, 4.0], "ours": [1.0, 2.0]}
    assert turns.losses == {"ours": [3.0, 3.0], "trl": [3.5, 3.5]} and turns.rates["ours"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        ({"loss_gap": 9e-5}, False),
        ({"loss_gap": 2e-4}, True),
        ({"loss_gap": 0.0, "gradient_gap": float("nan")}, True),
        ({"ratio": 0.5}, False),
    ],
)
def test_which_gaps_are_an_error(row: dict[str, float], bad: bool) -> None:
    assert trl_baseline.wrong({"sft fp32, packed": row}) == (["sft fp32, packed"] if bad else [])
    assert trl_baseline.wrong({"sft bf16, packed": row}) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_trl_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert trl_baseline.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: trl: must be installed (pip install 'trl==1.16.0')")
        and error.count("\n") == 1
    )


def test_both_sides_agree(tmp_path: Path) -> None:
    """The same losses step by step in both of trl's forms, and the same GRPO loss and gradient; of speed nothing is asked."""
    pytest.importorskip("trl", reason="the optional package trl is not installed")
    file = tmp_path / "result.json"
    quick = ["--precision", "fp32", "--answer", "4", "--steps", "4", "--json", str(file)]
    small = ["sft.schedule.peak=1e-2", "grpo.prompts=4", "grpo.group=4", "grpo.beta=0.1"]
    assert trl_baseline.main([*quick, "tiny", *MICRO, *small]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert list(cases) == [
        "sft fp32, packed",
        "sft fp32, padded",
        "grpo, same outputs",
        "grpo fp32, answers of 4",
    ]
    for form in ("packed", "padded"):
        losses = cases[f"sft fp32, {form}"]["losses"]
        assert len(losses["ours"]) == len(losses["trl"]) == 4 and cases[f"sft fp32, {form}"]["turns"] == 2
        assert max(abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True)) < 1e-4
    formula = cases["grpo, same outputs"]
    assert formula["loss_gap"] < 1e-4 and formula["gradient_gap"] < 1e-4 and 0 < formula["clip_fraction"] < 1
