"""transformers' DeepseekV3 as the reference: built in memory from our weights, with our names back for its gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from examples.model.config import ModelConfig, YarnConfig
from examples.model.hf import hf_config, hf_views, to_hf_state_dict
from examples.model.transformer import Transformer

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_layers": 3,
    "num_dense_layers": 1,
    "num_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "dense_inner_size": 80,
    "expert_inner_size": 24,
    "num_experts": 16,
    "num_shared_experts": 2,
    "top_k": 4,
    "num_groups": 4,
    "top_groups": 2,
    "mtp_depth": 1,
    "max_positions": 64,
    "init_std": 0.08,
    "precision": "fp32",
}
VARIANTS = {
    "plain": {},
    "yarn": {"max_positions": 256, "yarn": YarnConfig(factor=8.0, original_max=32, beta_fast=4.0)},
    "no_q_lora": {"q_lora_rank": None},
    "one_group": {"num_groups": 1, "top_groups": 1, "num_shared_experts": 1, "top_k": 2},
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, in fp64."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


class Reference:
    """What tests share; reached through the fixture `ref`."""

    variants = VARIANTS
    relative = staticmethod(relative)

    @staticmethod
    def config(**changes: object) -> ModelConfig:
        """The tiny test shape with changes."""
        return ModelConfig(**{**SHAPE, **changes})  # type: ignore[arg-type]

    @staticmethod
    def model(config: ModelConfig, seed: int = 0) -> Transformer:
        """Random weights, norms away from 1 and routing biases away from 0, so that no term can hide."""
        torch.manual_seed(seed)
        model = Transformer(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            for router in model.routers():
                router.bias.copy_(0.1 * torch.randn_like(router.bias))
        return model

    @staticmethod
    def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        """Random ids."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=generator)

    @staticmethod
    def hf(model: Transformer) -> DeepseekV3ForCausalLM:
        """transformers' model with the same weights (without MTP, which it does not train)."""
        settings = DeepseekV3Config(**hf_config(model.config))
        theirs = DeepseekV3ForCausalLM(settings)
        state = to_hf_state_dict(model)
        theirs.load_state_dict({name: _fused(name, state, model.config) for name in theirs.state_dict()})
        return theirs

    @staticmethod
    def hf_mtp(model: Transformer, main: DeepseekV3ForCausalLM) -> tuple[MtpModel, MtpCache]:
        """transformers' MtpModel around `main`, filled from our MTP modules, with its cache."""
        theirs = MtpModel(main, model.config.mtp_depth)
        state = to_hf_state_dict(model)
        new = {}
        for name, tensor in theirs.state_dict().items():
            if not name.startswith("layers."):
                new[name] = tensor  # embedding and head, shared with `main`
                continue
            _, depth, rest = name.split(".", 2)
            rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.", 1)
            new[name] = _fused(
                f"model.layers.{model.config.num_layers + int(depth)}.{rest}", state, model.config
            )
        theirs.load_state_dict(new)
        return theirs, MtpCache(config=main.config.get_mtp_config())

    @staticmethod
    def gradients(
        model: Transformer, theirs: DeepseekV3ForCausalLM
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(ours, theirs) for every parameter of transformers' model."""
        ours = hf_views(model.config, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        return {n: (_fused(n, ours, model.config), p.grad) for n, p in theirs.named_parameters()}


def _fused(name: str, state: dict[str, torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """transformers keeps experts fused in memory; the files, and our names for them, keep them apart."""
    base, _, last = name.rpartition(".")
    experts = range(config.num_experts)
    if last == "gate_up_proj":
        pairs = [
            (state[f"{base}.{e}.gate_proj.weight"], state[f"{base}.{e}.up_proj.weight"]) for e in experts
        ]
        return torch.stack([torch.cat(pair) for pair in pairs])
    if last == "down_proj":
        return torch.stack([state[f"{base}.{e}.down_proj.weight"] for e in experts])
    return state[name]


@pytest.fixture(scope="session")
def ref() -> Reference:
    """Builders and measures shared by the model's tests."""
    return Reference()
