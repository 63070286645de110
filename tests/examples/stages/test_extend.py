"""Context extension on a micro model: the report's numbers, YaRN where it belongs, exact resumption, weights that say what they are."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.configs import CONFIG_NAMES, YarnConfig, get_config, parse_overrides, quick
from examples.configs.schedules import REPORT
from examples.errors import UserError
from examples.model.hf.config import hf_config, model_config
from examples.model.hf.export import ExportOptions, export
from examples.model.transformer import Transformer
from examples.rollout.generate import generate
from examples.rollout.load import load_run
from examples.run import main
from examples.stages.extend import with_yarn
from examples.train.checkpoint import list_checkpoints, load_checkpoint
from examples.train.metrics import read_metrics
from examples.train.runner import Weights, start_weights

from ..train.conftest import MICRO

REPOSITORY = Path(__file__).parents[3]
ARGUMENTS = [
    "tiny",
    "--threads",
    "1",
    *MICRO,
    "train.schedule.total_tokens=512",
    "extend.needles=2",
    "sft.start=extend",
    "sft.sources=sums",
    "sft.counts=30",
    "sft.batch_size=4",
    "sft.schedule.epochs=1",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run folder with a micro model in it."""
    root = tmp_path_factory.mktemp("extend") / "start"
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "tokenize,pretrain"]) == 0
    return root


@pytest.fixture(scope="module")
def finished(pretrained):
    """The same, extended and fine-tuned from there."""
    root = pretrained.parent / "finished"
    shutil.copytree(pretrained, root)
    assert main([*ARGUMENTS, "--run-dir", str(root), "--stages", "extend,sft"]) == 0
    return root


def result(root, stage="extend"):
    return json.loads((root / stage / "done.json").read_text())["result"]


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_reports_numbers():
    config = get_config("v3_671b")
    extend = config.extend
    assert extend.yarn == YarnConfig(
        factor=40.0, original_max=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0
    )
    model = replace(config.model, yarn=extend.yarn)
    assert (model.softmax_scale * 192**0.5) ** 0.5 == pytest.approx(1.36889, abs=1e-5)  # sqrt(t)
    assert [(p.sequence_length, p.batch_size, p.steps, p.learning_rate) for p in extend.phases] == [
        (32768, 1920, 1000, 7.3e-6),
        (131072, 480, 1000, 7.3e-6),
    ]
    assert extend.longest == 163840 and extend.bias_speed == 0.0 and extend.mtp_weight == 0.1
    assert config.model.yarn is None and config.model.max_positions == 4096  # only after pre-training


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_proportions_of_every_size(name):
    config = get_config(name)
    extend, schedule = config.extend, config.train.schedule
    extend.check(config.data.seq_len)
    first, second = extend.phases
    assert extend.yarn.factor == 1.25 * second.sequence_length / config.data.seq_len
    last_batch = schedule.batch_size.end * schedule.sequence_length
    for phase in (first, second):
        assert phase.sequence_length * phase.batch_size == last_batch
        assert phase.learning_rate == pytest.approx(schedule.learning_rate.last)
    assert REPORT.learning_rate.last == 7.3e-6
    shorter = quick(config).extend
    assert shorter.first.steps == first.steps // 3 and shorter.yarn == extend.yarn


# --- YaRN ----------------------------------------------------------------------------------------------------------


def model(**changes):
    shape = {"precision": "fp32", "init_std": 0.2, "max_positions": 160, **changes}
    config = parse_overrides(get_config("tiny"), MICRO).model
    torch.manual_seed(0)
    return Transformer(replace(config, **shape)).eval()


TOKENS = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def without_rotary_part(model):
    """The shared key's rotary part is 0, so no score has one."""
    for block in [*model.layers, *(m.block for m in model.mtp)]:
        block.attn.qkv_a.weight[-block.attn.rope_dim :] = 0
    return model


@torch.no_grad()
def test_yarn_touches_only_the_rotary_part():
    yarn = YarnConfig(factor=5.0, original_max=32, mscale=0.0)  # temperature 1: frequencies alone
    plain, stretched = model(), model(yarn=yarn)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stretched.parameters(), strict=True))
    change = (plain.logits(TOKENS) - stretched.logits(TOKENS)).abs().amax((0, 2))
    assert change[0] == 0 and change[10:].min() > 1e-3
    plain, stretched = without_rotary_part(plain), without_rotary_part(stretched)
    assert torch.equal(plain.logits(TOKENS), stretched.logits(TOKENS))
    for a, b in zip(plain.mtp_logits(TOKENS), stretched.mtp_logits(TOKENS), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_the_first_layer_caches_the_same_latents_and_other_keys():
    pages = []
    for yarn in (None, YarnConfig(factor=5.0, original_max=32)):
        one = model(yarn=yarn)
        cache = one.new_cache(2, 128)
        one.prefill(TOKENS, cache)
        pages.append(cache.pages[0])
    latent = model().config.kv_lora_rank
    assert torch.equal(pages[0][..., :latent], pages[1][..., :latent])
    assert not torch.equal(pages[0][..., latent:], pages[1][..., latent:])


@torch.no_grad()
def test_a_factor_of_one_is_plain_rope():
    plain, one = model(), model(yarn=YarnConfig(factor=1.0, original_max=32))
    assert plain.config.softmax_scale == one.config.softmax_scale
    assert torch.equal(plain.logits(TOKENS), one.logits(TOKENS))


# --- the stage -----------------------------------------------------------------------------------------------------


def test_the_phases_follow_each_other_at_the_last_rate(finished):
    rows = read_metrics(finished / "extend" / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    assert [r["sequence_length"] for r in steps] == [64] * 4 + [128] * 3
    assert [r["step"] for r in steps] == list(range(1, 8))
    rate = get_config("tiny").train.schedule.learning_rate.last
    assert all(r["lr"] == rate for r in steps)
    assert [r["step"] for r in rows if "held_out" in r] == [0, 4, 7]
    assert [r["tokens"] for r in steps][-1] == 7 * 256
    phases = result(finished)["phases"]
    assert phases[0]["loss"] == [steps[0]["loss"], steps[3]["loss"]]
    assert phases[1]["loss"] == [steps[4]["loss"], steps[6]["loss"]] and phases[1]["tokens"] == 3 * 256


def test_the_result_says_what_was_measured(finished):
    found = result(finished)
    assert (found["trained_length"], found["final_length"], found["bin_width"]) == (32, 128, 8)
    assert list(found["positions"]) == ["plain", "untrained", "phase_1", "phase_2"]
    sources = found["positions"]["plain"]["by_source"]
    assert found["blocks"] == sum(s["blocks"] for s in sources.values()) >= 2
    for name, one in found["positions"].items():
        assert len(one["curve"]) == 16
        assert one["first"] == pytest.approx(sum(one["curve"][:4]) / 4)
        assert one["last"] == pytest.approx(sum(one["curve"][-4:]) / 4)
        assert found["flat"][name] == (one["rise"] <= found["margin"])
    assert found["shown"] == (found["flat"]["phase_2"] and not found["flat"]["plain"])
    # Within the trained length plain RoPE and YaRN differ by the temperature and the stretched frequencies, not by much.
    assert found["positions"]["untrained"]["first"] == pytest.approx(
        found["positions"]["plain"]["first"], abs=0.1
    )
    metrics = [r["held_out"] for r in read_metrics(finished / "extend" / "metrics.jsonl") if "held_out" in r]
    assert metrics == [found["positions"][k] for k in ("untrained", "phase_1", "phase_2")]
    needle = found["needle"]
    assert needle["before"]["lengths"][-1] == 128 - 8 and needle["after"]["trials"] == 2
    score = needle["after"]["score"]
    assert score["chance"] == pytest.approx(1 / 900)
    assert score["count"] == 2 * 5 * len(needle["after"]["lengths"])


def test_training_moves_the_weights_and_not_the_routing_bias(pretrained, finished):
    before, after = (start_weights(p) for p in (pretrained / "pretrain", finished / "extend"))
    assert before.model.keys() == after.model.keys()
    for name in before.model:
        same = torch.equal(before.model[name], after.model[name])
        if name.endswith("router.bias"):
            assert same
        elif name in ("embed.weight", "mtp.0.proj.weight", "layers.1.attn.qkv_a.weight"):
            assert not same
            assert (
                before.masters[name] - after.masters[name]
            ).abs().max() < 10 * 1e-4  # 7 steps of rate 1e-4


def test_weights_carry_yarn_into_what_follows(finished, tmp_path):
    wanted = YarnConfig(factor=5.0, original_max=32)
    for stage in ("extend", "sft"):
        config = start_weights(finished / stage).config
        assert config.yarn == wanted and config.max_positions == 160
    assert result(finished, "sft")["steps"] > 0
    loaded = load_run(finished)
    assert loaded.stage == "sft" and loaded.chats and loaded.model.config.yarn == wanted
    prompt = [5 + i % 300 for i in range(150)]
    assert len(generate(loaded.model, [prompt], 8, eos=None).tokens[0]) == 8
    folder = export(finished, tmp_path / "hf", ExportOptions(), stage="extend", quiet=True)
    values = json.loads((folder / "config.json").read_text())
    assert values["max_position_embeddings"] == 160
    assert values["rope_scaling"]["type"] == "yarn" and values["rope_scaling"]["factor"] == 5.0
    assert values["rope_scaling"]["original_max_position_embeddings"] == 32
    assert model_config(values, "x", precision="bf16") == loaded.model.config


def test_exported_numbers_of_the_released_model():
    config = get_config("v3_671b")
    values = hf_config(replace(config.model, yarn=config.extend.yarn, max_positions=config.extend.longest))
    assert values["max_position_embeddings"] == 163840
    assert values["rope_scaling"] == {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip


def test_kill_nine_in_both_phases_and_resume(pretrained, finished):
    broken = pretrained.parent / "broken"
    shutil.copytree(pretrained, broken)
    command = [sys.executable, "-m", "examples.run", *ARGUMENTS, "--run-dir", str(broken)]
    command += ["--stages", "extend"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for lines in (3, 7):  # inside the first phase; in the second, whose first checkpoint is of step 6
        process = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
        metrics = broken / "extend" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
        assert not (broken / "extend" / "done.json").exists()
    last = subprocess.run(command, check=False, cwd=REPOSITORY, timeout=240, **pipes)
    assert last.returncode == 0 and "continuing from step" in last.stdout, last.stdout
    (a, b) = (load_checkpoint(list_checkpoints(root / "extend")[-1]) for root in (finished, broken))
    assert a.meta == b.meta and a.step == 7
    for part in ("model", "optimizer"):
        assert_equal(a.tensors[part], b.tensors[part])
    rows = [
        [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in lines]
        for lines in (read_metrics(root / "extend" / "metrics.jsonl") for root in (finished, broken))
    ]
    assert rows[0] == rows[1]
    assert result(finished) == result(broken)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_equal(value, b[name])
        else:
            assert torch.equal(value, b[name]), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["extend.first.sequence_length=16"],
            r"extend.first.sequence_length: must be more than data.seq_len = 32, the trained length; got 16",
        ),
        (
            ["extend.second.sequence_length=32"],
            r"extend.second.sequence_length: .* at least extend.first.sequence_length = 64; got 32",
        ),
        (
            ["extend.second.sequence_length=100"],
            r"extend.second.sequence_length: must be a multiple of data.seq_len = 32 .*; got 100",
        ),
        (
            ["extend.second.sequence_length=192"],
            r"extend.yarn.factor: must be at least 6, .* = 192 .*; got 5",
        ),
        (
            ["extend.yarn.original_max=64"],
            r"extend.yarn.original_max: must be data.seq_len = 32, the trained length; got 64",
        ),
    ],
)
def test_a_target_that_extends_nothing_is_refused(overrides, words):
    config = parse_overrides(get_config("tiny"), [*MICRO, *overrides])
    with pytest.raises(UserError, match=words):
        with_yarn(Weights(config.model, {}, {}), config)


def test_other_limits(tmp_path):
    config = parse_overrides(get_config("tiny"), MICRO)
    extended = replace(config.model, yarn=config.extend.yarn)
    with pytest.raises(UserError, match="trained without YaRN; got 'pretrain' with factor 5"):
        with_yarn(Weights(extended, {}, {}), config)
    for override, words in (
        ("extend.first.steps=0", "extend.first.steps: must be at least 1; got 0"),
        ("extend.second.learning_rate=0", "extend.second.learning_rate: must be positive; got 0"),
        ("extend.needles=0", "extend.needles: must be at least 1; got 0"),
        ("extend.seed=-1", "extend.seed: must not be negative; got -1"),
        ("extend.yarn.beta_slow=99", "yarn.beta_fast: must exceed yarn.beta_slow"),
    ):
        with pytest.raises(UserError, match=words):
            parse_overrides(config, [override])
    with pytest.raises(UserError, match="must hold a checkpoint to start from"):
        start_weights(tmp_path / "nothing")
