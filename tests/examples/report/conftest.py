"""A run folder in which every stage has finished, written by hand: what each would leave, with numbers that can be recognised."""

import json

import pytest

SOURCES = ("kjv", "python")


def held_out(loss):
    source = {"loss": loss, "mtp_loss": loss + 1, "bits_per_byte": loss / 2, "tokens": 10, "bytes": 20}
    return {
        "loss": loss,
        "bits_per_byte": loss / 2,
        "sources": dict.fromkeys(SOURCES, source),
        "load": [[1.1, 0.9], [1.2, 0.8]],
        "max_violation": [0.1, 0.2],
    }


def score(value, **more):
    return {
        "value": value, "low": value - 0.1, "high": value + 0.1, "count": 40, "chance": 0.5, "near_chance": False, **more,
    }  # fmt: skip


CONFIG = {
    "name": "tiny",
    "sft": {"schedule": {"peak": 5e-6, "final": 1e-6}},
    "grpo": {"prompts": 4, "group": 8},
}  # what the page reads of it


def answers(accuracy):
    shown = [{"question": "3 + 4 =", "wanted": "7", "answer": "7|8"}]
    return {"accuracy": accuracy, "length": 2.5, "problems": 64, "samples": shown}


def pretrained(loss=3.0, violation=0.2, precision="bf16"):
    found = held_out(loss) | {"max_violation": [0.1, violation]}
    sizes = {"step": 10, "tokens": 160, "parameters": 1000000, "mtp_parameters": 200000}
    return {**sizes, "precision": precision, "held_out": found}


def positions(rise):
    by_block = [2.0 + rise * i / 3 for i in range(4)]
    return {
        "curve": [v for v in by_block for _ in range(4)],
        "first": 2.0,
        "last": 2.0 + rise,
        "rise": rise,
        "standard_error": 0.01,
        "by_source": {},
    }


def grid(value):
    return {
        "lengths": [24, 56], "depths": [0.0, 1.0], "accuracy": [[value, 0.5], [0.25, 0.0]],
        "log_p": [[-1.0, -2.0], [-3.0, -4.0]], "score": score(value),
    }  # fmt: skip


def results():
    """What every stage returns."""
    row = {
        "documents": 9,
        "bytes": 900,
        "tokens": 300,
        "bytes_per_token": 3.0,
        "licence": "MIT",
        "package": "p",
    }
    phase = {
        "steps": 5,
        "batch_size": 2,
        "sequence_length": 64,
        "learning_rate": 1e-3,
        "tokens": 640,
        "loss": [3.0, 2.5],
    }
    return {
        "tokenize": {"vocab_size": 384, "sources": [{"source": s, **row, "version": None} for s in SOURCES]},
        "pretrain": pretrained(),
        "without_bias": pretrained(violation=2.0),
        "fp8": pretrained(3.003, precision="fp8"),
        "extend": {
            "trained_length": 32,
            "final_length": 128,
            "yarn": {"factor": 40.0},
            "phases": [phase, phase | {"sequence_length": 128}],
            "positions": {
                "plain": positions(1.5), "untrained": positions(0.2), "phase_1": positions(0.1), "phase_2": positions(0.02),
            },
            "bin_width": 8,
            "blocks": 6,
            "margin": 0.05,
            "flat": {"plain": False, "untrained": False, "phase_1": False, "phase_2": True},
            "needle": {"filler": "kjv", "before": grid(0.1), "after": grid(0.7)},
        },
        "evaluate": {"trained": held_out(3.0), "ema": held_out(2.9)},
        "generate": {
            "prompts": 4, "new_tokens": 100, "plain_tokens_per_second": 50.0, "speculative_tokens_per_second": 70.0,
            "acceptance": 0.7, "tokens_per_pass": 1.7, "acceptance_by_source": dict.fromkeys(SOURCES, 0.7), "equals_greedy": True,
            "samples": [{"source": "python", "prompt": "a <b> ```", "text": "<script>x</script> ``` & more"}],
        },
        "sft": {
            "steps": 10, "samples": {"sums": 60}, "dropped": 0,
            "before": {"loss": 5.0, "mtp_loss": 6.0, "sources": {"sums": 5.0}, "answer_tokens": 9},
            "after": {"loss": 2.0, "mtp_loss": 3.0, "sources": {"sums": 2.0}, "answer_tokens": 9},
            "answers": [{"source": "sums", "question": "1 + 1 =", "wanted": "2", "answer": "x", "after": "2"}],
        },
        "reward": {
            "steps": 10, "pairs": {"sums": 30}, "dropped": 0,
            "before": {"loss": 3.0, "agreement": {"sums": score(0.5, consistent=0.4, first=0.9, near_chance=True)}},
            "after": {"loss": 1.0, "agreement": {"sums": score(0.9, consistent=0.8, first=0.5)}},
            "voting": {"sums": {"single": score(0.6), "voted": score(0.8), "votes": 5}},
            "samples": [
                {"kind": "sums", "prompt": "1 + 1 =", "chosen": "2", "rejected": "3", "rationale": "it is 2", "probability_of_chosen": 0.9, "consistent": True}
            ],
        },
        "grpo": {"steps": 10, "before": answers(0.4), "after": answers(0.6), "gain": 0.2},
        "distill": {
            "rejection": {
                "problems": 8, "answers": 64, "kept": 20, "wrong": 30, "unfinished": 14, "repeated": 0, "faults": {},
                "mean_length_drawn": 4.0, "mean_length_kept": 3.0,
            },
            "before": answers(0.4), "after": answers(0.55), "asked_to_reflect": answers(0.5), "held_out_loss": [2.0, 1.5], "steps": 10,
        },
        "benchmarks": {
            "models": ["pretrain", "sft"], "absent": ["grpo"],
            "scores": [
                {"model": "pretrain", "task": "sums", "name": "sums", "unit": "share", **score(0.1, chance=0.1, near_chance=True)},
                {"model": "sft", "task": "sums", "name": "sums", "unit": "share", **score(0.6, chance=0.1), "samples": [{"question": "q", "answer": "a", "said": "s"}]},
                {"model": "sft", "task": "text", "name": "bits per byte", "unit": "bits/byte", **score(1.6)},
                {"model": "sft", "task": "code", "name": "code", "why": "there is no sandbox here"},
            ],
        },
    }  # fmt: skip


def metrics():
    """The lines of metrics.jsonl of every stage that trains, 10 steps and two evaluations."""

    def rows(step_values, evaluation):
        steps = [{"step": i, "tokens": 16 * i, "lr": 1e-3, **step_values(i)} for i in range(1, 11)]
        return [*steps[:5], {"step": 5, "tokens": 80, "held_out": evaluation}, *steps[5:], {"step": 10, "tokens": 160, "held_out": evaluation}]  # fmt: skip

    def pretraining(scale):
        values = {"gamma": 0.01, "updated": True}
        return rows(
            lambda i: values | {"loss": scale * 10 / i, "mtp_loss": [11 / i], "max_violation": [0.1, 0.2]},
            held_out(3.0),
        )

    tuning = rows(lambda i: {"loss": 5 / i, "mtp_loss": [6 / i]}, results()["sft"]["after"])
    keys = (
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "clip_fraction",
        "zero_variance_groups",
        "length",
        "ended",
    )
    return {
        "pretrain": pretraining(1.0),
        "without_bias": pretraining(1.0),
        "fp8": pretraining(1.001),
        "extend": tuning,
        "sft": tuning,
        "reward": tuning,
        "grpo": rows(lambda i: {key: i / 20 for key in keys}, answers(0.5)),
        "distill": tuning,
    }


def write(root, found=None, lines=None):
    """A run folder with these results and metrics."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(CONFIG))
    for stage, result in (results() if found is None else found).items():
        (root / stage).mkdir()
        done = {"result": result, "output": f"{stage}-digest", "seconds": 61.0, "peak_memory_mib": 512.0}
        (root / stage / "done.json").write_text(json.dumps(done))
        rows = (metrics() if lines is None else lines).get(stage, [])
        if rows:
            (root / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """(folder of the page about the whole story, its findings by key)."""
    from examples.report.compose import compose

    root = write(tmp_path_factory.mktemp("report") / "run")
    findings = compose(root, root / "report", tuple(results()))
    return root / "report", {finding.key: finding for finding in findings}
