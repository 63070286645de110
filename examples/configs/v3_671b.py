"""DeepSeek-V3 itself: report sections 4.2 (shape, optimizer, schedules), 2.1.2 (routing) and 3.3 (FP8).

671.026B parameters, and 11.61B more that only the MTP module has. `routed_scale` and the 8 groups come from the
released configuration, the rest from the report; YaRN comes later, with the context extension (section 4.3): `extend`.
"""

from __future__ import annotations

from examples.configs.extension import ExtendConfig
from examples.configs.run_config import DataConfig, RunConfig, TrainConfig
from examples.configs.schedules import REPORT
from examples.model.config import ModelConfig

CONFIG = RunConfig(
    name="v3_671b",
    model=ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_inner_size=18432,
        expert_inner_size=2048,
        num_experts=256,
        num_shared_experts=1,
        top_k=8,
        num_groups=8,
        top_groups=4,
        routed_scale=2.5,
        mtp_depth=1,
        max_positions=4096,
        rope_theta=10000.0,
        norm_eps=1e-6,
        init_std=0.006,
        precision="fp8",
        recompute=True,
    ),
    data=DataConfig(seq_len=4096, fim_rate=0.1, document_mask=False),
    train=TrainConfig(schedule=REPORT, moments="bf16"),
    extend=ExtendConfig(),
)
