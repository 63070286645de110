"""The small scale of the report's ablations (sections 4.5.1, 4.5.2, B.1): about 16B parameters on 1.33T tokens.

The report gives only the two totals. The shape is that of the earlier DeepSeek-V2-Lite (15.7B), the only published one
of this size, with the mechanisms of V3 on it: sigmoid affinities, routing bias, one MTP module. Choices that no paper
fixes: routed_scale, the rates (section 4.2's), and the places of the schedule's borders (section 4.2's proportions).
"""

from __future__ import annotations

from examples.configs.extension import ExtendConfig
from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.configs.schedules import BILLION, REPORT, ContextPhase
from examples.model.config import ModelConfig

CONFIG = RunConfig(
    name="v3_16b",
    model=ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_inner_size=10944,
        expert_inner_size=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        num_groups=1,
        top_groups=1,
        mtp_depth=1,
        max_positions=4096,
        precision="fp8",
    ),
    data=DataConfig(seq_len=4096),
    train=TrainConfig(
        schedule=REPORT.scaled(
            1_330 * BILLION,
            sequence_length=4096,
            start_batch=1024,
            end_batch=4608,
            batch_quantum=512,
            warmup_fraction=0.028,  # about the report's 2000 steps
        ),
    ),
    # The report's lengths and YaRN; batches with as many tokens as its last ones of pre-training.
    extend=ExtendConfig(first=ContextPhase(32 * 1024, 576), second=ContextPhase(128 * 1024, 144)),
)
