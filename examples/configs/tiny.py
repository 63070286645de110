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
from examples.configs.post_training import DistillConfig, GrpoConfig, SftConfig
from examples.configs.reward import RewardConfig
from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.configs.schedules import REPORT, SftSchedule
from examples.model.config import ModelConfig

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
        schedule=REPORT.scaled(
            400 * 16 * 256,
            sequence_length=256,
            start_batch=16,
            end_batch=16,
            warmup_fraction=1 / 15,
            peak_lr=3e-3,
            bias_speed=0.01,
        ),
        eval_every=100,
        checkpoint_every=100,
        twin_share=0.25,
        ema_decay=0.98,
    ),
    # The rates keep the report's 5 : 1 but are 400 times larger, and rows few: 400 steps must teach a new form and sums, for
    # GRPO learns nothing from groups in which no answer is right. So most conversations are sums.
    sft=SftConfig(
        schedule=SftSchedule(peak=2e-3, final=4e-4),
        batch_size=4,
        counts=(16000, 60, 120, 60),
        eval_every=100,
        checkpoint_every=100,
    ),
    # One-digit sums from an accuracy of about 0.4; with fewer prompts and a larger rate it gets worse instead.
    grpo=GrpoConfig(
        steps=160,
        prompts=16,
        group=16,
        learning_rate=1e-4,
        beta=0.001,
        max_new_tokens=6,
        eval_every=40,
        checkpoint_every=20,
    ),
    distill=DistillConfig(problems=1024, samples=8, max_new_tokens=6),
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
