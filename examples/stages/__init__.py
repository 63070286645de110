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

RECIPE = (
    Stage("tokenize", (), tokenize.run, "real text -> byte-level BPE -> token shards (section 4.1)"),
    Stage("pretrain", ("tokenize",), pretrain.run, "pre-training (section 4.2)"),
    Stage(
        "without_bias",
        ("tokenize",),
        pretrain.run_without_bias,
        "twin without the routing bias (section 4.5.2)",
    ),
    Stage("fp8", ("tokenize",), pretrain.run_fp8, "twin in FP8 (section 3.3)"),
    Stage("extend", ("pretrain",), extend.run, "YaRN context extension in two phases (section 4.3)"),
    Stage("evaluate", ("pretrain",), evaluate.run, "bits per byte of each source"),
    Stage("generate", ("pretrain",), generate.run, "latent-cache generation and MTP speculative decoding"),
)

# Selectable by `--stages`, not part of the default recipe yet.
OPTIONAL = (
    Stage("sft", ("pretrain",), sft.run, "supervised fine-tuning (section 5.1)"),
    Stage(
        "reward", ("sft",), reward.run, "a judge trained on preferences, and voting (sections 5.2.1, 5.4.2)"
    ),
    Stage("grpo", ("sft",), grpo.run, "reinforcement learning on verifiable problems (section 5.2)"),
    Stage(
        "distill",
        ("sft", "grpo"),
        distill.run,
        "expert's answers, rejection, final fine-tuning (section 5.1)",
    ),
    Stage(
        "benchmarks",
        ("pretrain",),
        benchmarks.run,
        "every model on the same tasks, with intervals (sections 4.4, 5.3)",
    ),
)

# The page about all of them comes last, and is made again when a stage has been added or made again.
REPORT = Stage(
    "report",
    ("tokenize",),
    report.run,
    "report.md, report.html and the pictures",
    uses=tuple(stage.name for stage in (*RECIPE, *OPTIONAL)),
    derived=True,
)
RECIPE += (REPORT,)
STAGES = (*RECIPE[:-1], *OPTIONAL, REPORT)  # every stage, in order
