"""The stages of the recipe, in order. A stage is one readable file: see `examples.stages.stage`."""

from examples.stages import (
    benchmarks,
    distill,
    evaluate,
    extend,
    generate,
    grpo,
    pretrain,
    report,
    reward,
    sft,
    tokenize,
)
from examples.stages.stage import Stage

STEPS = (
    Stage("tokenize", (), tokenize.run, "real text -> byte-level BPE -> token shards (section 4.1)"),
    Stage("pretrain", ("tokenize",), pretrain.run, "pre-training (section 4.2)"),
    Stage(
        "without_bias",
        ("tokenize",),
        pretrain.run_without_bias,
        "twin without the routing bias (section 4.5.2)",
    ),
    Stage("fp8", ("tokenize",), pretrain.run_fp8, "twin in FP8 (section 3.3)"),
    Stage("evaluate", ("pretrain",), evaluate.run, "bits per byte of each source"),
    Stage("generate", ("pretrain",), generate.run, "latent-cache generation and MTP speculative decoding"),
    Stage("extend", ("pretrain",), extend.run, "YaRN context extension in two phases (section 4.3)"),
    Stage("sft", (), sft.run, "supervised fine-tuning (section 5.1)"),
    Stage("reward", (), reward.run, "a judge trained on preferences, and voting (sections 5.2.1, 5.4.2)"),
    Stage("grpo", (), grpo.run, "reinforcement learning on verifiable problems (section 5.2)"),
    Stage("distill", (), distill.run, "expert's answers, rejection, final fine-tuning (section 5.1)"),
    Stage(
        "benchmarks",
        ("pretrain",),
        benchmarks.run,
        "every model on the same tasks, with intervals (sections 4.4, 5.3)",
        uses=("extend", "sft", "grpo", "distill"),
        derived=True,
    ),
)
RECIPE = (
    *STEPS,
    Stage(
        "report",
        ("tokenize",),
        report.run,
        "report.md, report.html and the pictures",
        uses=tuple(stage.name for stage in STEPS),
        derived=True,
    ),
)
