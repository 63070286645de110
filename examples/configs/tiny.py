"""The report's whole recipe in minutes on two CPU cores: 2.2M parameters, every mechanism on.

Shapes keep the ratios of section 4.2 where they can (one dense layer, 4 groups of experts of which 2 may be visited,
rotary part a third of a key). Token counts keep the proportions of the schedule: 68% constant rate, 29% cosine, the
rest at the end rates. Four numbers are not scaled from the report: the rate, as small models want larger ones; gamma, because
0.001 moves the routing bias too little in some hundred steps (0.01 balances as the report shows); the initial spread, which
keeps the report's product with the square root of the width (0.006 at 7168); and the mixture, which the report does not
publish: here half of it is easy to learn, so that minutes show something.
"""

from __future__ import annotations

from examples.configs.benchmarks import BenchmarksConfig
from examples.configs.extension import ExtendConfig
from examples.configs.post_training import DistillConfig, GrpoConfig, SftConfig
from examples.configs.reward import RewardConfig
from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.configs.schedules import REPORT, ContextPhase, SftSchedule
from examples.model.config import ModelConfig, YarnConfig

SCHEDULE = REPORT.scaled(
    400 * 16 * 256,
    sequence_length=256,
    start_batch=16,
    end_batch=16,
    warmup_fraction=1 / 15,
    peak_lr=3e-3,
    bias_speed=0.01,
)
LAST_RATE = SCHEDULE.learning_rate.last

CONFIG = RunConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=3,
        num_dense_layers=1,
        num_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_inner_size=384,
        expert_inner_size=64,
        num_experts=16,
        num_shared_experts=1,
        top_k=4,
        num_groups=4,
        top_groups=2,
        mtp_depth=1,
        max_positions=256,
        init_std=0.045,
        precision="bf16",
    ),
    data=DataConfig(
        sources=("shakespeare", "kjv", "python", "multilingual", "maths"),
        weights=(0.1, 0.25, 0.15, 0.1, 0.4),
        seq_len=256,
        shuffle_rows=1024,
        held_out_every=20,
    ),
    train=TrainConfig(
        schedule=SCHEDULE,
        eval_every=100,
        checkpoint_every=100,
        twin_share=0.25,
        ema_decay=0.98,
    ),
    # To 4 times the trained length, not 32; s keeps the report's 1.25 times that. rope_theta stays 10000: 4 of the 8 rotary pairs do
    # not turn once within 256 positions (9 of 32 at the report's size), so plain RoPE fails beyond them.
    extend=ExtendConfig(
        yarn=YarnConfig(factor=5.0, original_max=256),
        first=ContextPhase(512, 8, steps=20, learning_rate=LAST_RATE),
        second=ContextPhase(1024, 4, steps=20, learning_rate=LAST_RATE),
        checkpoint_every=10,
        eval_blocks=8,
        needles=4,
    ),
    # The rates keep the report's 5 : 1 but are 400 times larger, and rows few: some hundred steps must teach a new form and to
    # sort digits. They end where about half of the greedy answers are right and fewer of the drawn ones: reinforcement
    # learning needs groups with right and wrong answers, and room above.
    sft=SftConfig(
        schedule=SftSchedule(peak=2e-3, final=4e-4),
        batch_size=4,
        counts=(500, 2500, 60, 120, 60),
        eval_every=100,
        checkpoint_every=100,
    ),
    # What it gives, greedy accuracy on 512 held-out problems, three seeds of fine-tuning and GRPO from one pre-trained model:
    # 0.455 -> 0.834, 0.568 -> 0.920, 0.428 -> 0.891; from one of `--quick`, with its third of the steps: 0.322 -> 0.549,
    # 0.438 -> 0.627, 0.357 -> 0.605. What we tried, single runs unless it says more, judged by the same held-out problems:
    # - Sums of two or three digits: 0.43 -> 0.46 to 0.52 in 120 steps; from a weaker start with partial credit for near
    #   answers 0.27 -> 0.39. They are a table of facts, and a reward teaches each by itself. Sorting is one rule: what a
    #   reward teaches on some problems holds for the others.
    # - Worked answers, for GRPO to prefer over bare ones (sums in steps, sums modulo 5, chains of assignments): after a
    #   minute of fine-tuning they were right as seldom, so there was nothing to find.
    # - 16 questions a step, on sums: the gradient is mostly noise, which AdamW turns into steps of full size; 1e-4 and 3e-4
    #   first lost what fine-tuning had learnt. With 64, a warm-up and a decay, on sorting, 80 steps gained 0.24 at 3e-4, 0.37
    #   and 0.33 (another seed) at 6e-4, 0.40 at 1e-3; in `--quick` 1.5e-3 was no better, and groups of 32 cost 1.7 times
    #   as much for the same.
    # - A KL term of 0.001 needs the reference's pass and all groups': a step costs 1.5 times as much. In equal time it gained
    #   less (0.37, 0.33, 0.40 in 120 steps).
    grpo=GrpoConfig(
        task="sorting",
        steps=160,
        prompts=64,
        group=16,
        learning_rate=1e-3,
        final_rate=3e-5,
        warmup=10,
        beta=0.0,
        kl_every=8,
        max_new_tokens=8,
        eval_prompts=512,
        eval_every=40,
        checkpoint_every=40,
    ),
    distill=DistillConfig(problems=1024, samples=8, max_new_tokens=8),
    # Most pairs are about size, which this model can learn; near numbers it cannot compare, and its page says so.
    reward=RewardConfig(
        system="Compare two responses.",
        schedule=SftSchedule(peak=2e-3, final=4e-4, epochs=1),
        batch_size=4,
        counts=(100, 900, 100, 250),
        held_out=100,
        max_new_tokens=6,
        max_rationale=20,
        vote_pairs=48,
        checkpoint_every=50,
    ),
    benchmarks=BenchmarksConfig(
        documents=12,
        document_tokens=256,
        cloze=60,
        arithmetic=64,
        code_samples=2,
        code_k=2,
        code_tokens=40,
        needles=4,
    ),
)
