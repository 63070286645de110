"""A step up from `tiny` for an afternoon on a CPU or minutes on one GPU: 23M parameters, and 4M of MTP."""

from __future__ import annotations

from examples.configs.benchmarks import BenchmarksConfig
from examples.configs.extension import ExtendConfig
from examples.configs.post_training import DistillConfig, GrpoConfig, SftConfig
from examples.configs.reward import RewardConfig
from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.configs.schedules import REPORT, ContextPhase, SftSchedule
from examples.model.config import ModelConfig, YarnConfig

SCHEDULE = REPORT.scaled(
    2000 * 32 * 512,
    sequence_length=512,
    start_batch=16,
    end_batch=32,
    warmup_fraction=0.05,
    peak_lr=1.5e-3,
    bias_speed=0.003,
)
LAST_RATE = SCHEDULE.learning_rate.last

CONFIG = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        num_layers=6,
        num_dense_layers=1,
        num_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_inner_size=768,
        expert_inner_size=128,
        num_experts=32,
        num_shared_experts=1,
        top_k=4,
        num_groups=4,
        top_groups=2,
        mtp_depth=1,
        max_positions=512,
        init_std=0.03,
        precision="fp32",
    ),
    data=DataConfig(seq_len=512, shuffle_rows=1024),
    train=TrainConfig(
        schedule=SCHEDULE,
        eval_every=100,
        checkpoint_every=250,
        ema_decay=0.99,
    ),
    # As in `tiny`: to 4 times the trained length, s = 5.
    extend=ExtendConfig(
        yarn=YarnConfig(factor=5.0, original_max=512),
        first=ContextPhase(1024, 16, steps=50, learning_rate=LAST_RATE),
        second=ContextPhase(2048, 8, steps=50, learning_rate=LAST_RATE),
        checkpoint_every=25,
    ),
    # As in `tiny`: rates that keep the report's 5 : 1, mostly verifiable problems. Not tuned.
    sft=SftConfig(
        schedule=SftSchedule(peak=1e-3, final=2e-4),
        batch_size=8,
        counts=(20000, 4000, 1000, 4000, 4000),
    ),
    grpo=GrpoConfig(
        prompts=64,
        group=16,
        learning_rate=3e-4,
        final_rate=3e-5,
        warmup=20,
        beta=0.0,
        kl_every=10,
        max_new_tokens=8,
    ),
    distill=DistillConfig(problems=4000, samples=8, max_new_tokens=8),
    reward=RewardConfig(
        schedule=SftSchedule(peak=1e-3, final=2e-4),
        batch_size=8,
        counts=(4000, 2000, 2000, 1000),
        max_new_tokens=8,
        max_rationale=24,
    ),
    benchmarks=BenchmarksConfig(document_tokens=512, code_samples=4, code_k=4, code_tokens=96),
)
