"""docs/memory.md: its numbers are those of the formulas, and the formulas are what a layer really keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_ops.nn import refresh_weights
from examples.configs import get_config
from examples.model.block import Block
from examples.model.config import ModelConfig
from examples.model.memory import VARIANTS, kept_per_token, table
from examples.model.mla import Layout, row_borders

PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
TINY = ModelConfig(
    vocab_size=16, hidden_size=144, num_layers=2, num_dense_layers=1, num_heads=3, q_lora_rank=24, kv_lora_rank=40,
    qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=56, dense_inner_size=200, expert_inner_size=72, num_experts=8,
    num_shared_experts=2, top_k=3, num_groups=2, top_groups=2,
)  # fmt: skip


class Made(TorchDispatchMode):
    """Remembers, weakly, every storage that appears inside."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, without):
        """Bytes of those that still exist, but for the storages of `without`."""
        skip = {t.untyped_storage()._cdata for t in without}
        return sum(
            size for key, (ref, size) in self.storages.items() if key not in skip and not ref.expired()
        )


def alive_after_forward(config, dense, tokens):
    """Every byte that one layer's forward pass leaves behind, whoever holds it: autograd, closures, modules."""
    torch.manual_seed(0)
    block = Block(config, dense=dense)
    refresh_weights(block)
    block(*rows(config, 4), layout(config, 4))  # what is made once is made now
    delta, residual = rows(config, tokens)
    where = layout(config, tokens)
    with Made() as made:
        out = block(delta, residual, where)
    inputs = (delta, residual, where.positions, where.cu_seqlens, where.inv_freq)
    copies = [t for m in block.modules() for c in getattr(m, "weight_caches", {}).values() for t in (*c._fprop, *c._dgrad)]  # fmt: skip
    return made.alive((out[0], *inputs, *block.parameters(), *block.buffers(), *copies))


def rows(config, tokens):
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    return [torch.randn(tokens, config.hidden_size).to(dtype).requires_grad_() for _ in range(2)]


def layout(config, tokens):
    inv_freq = torch.ones(config.qk_rope_head_dim // 2)
    return Layout(torch.arange(tokens), row_borders(1, tokens, torch.device("cpu")), inv_freq)


@pytest.mark.parametrize("q_lora", [24, None], ids=["q_lora", "whole_q"])
@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_keeps_what_the_formulas_say(variant, dense, q_lora):
    config = replace(TINY, q_lora_rank=q_lora, **VARIANTS[variant])
    few, many = 16, 80  # the difference is what grows with tokens
    measured = (alive_after_forward(config, dense, many) - alive_after_forward(config, dense, few)) / (
        many - few
    )
    assert measured == sum(kept_per_token(config, dense=dense).values())


def test_the_page_shows_the_formulas():
    text = PAGE.read_text()
    v3 = get_config("v3_671b").model
    assert table(v3) in text and table(v3, dense=True) in text
    fp8 = kept_per_token(replace(v3, precision="fp8", recompute=True))
    bf16 = kept_per_token(replace(v3, precision="bf16", recompute=False))
    assert sum(fp8.values()) < 0.27 * sum(bf16.values())
    for name, changes in VARIANTS.items():
        config = replace(v3, **changes)
        moe, dense = (sum(kept_per_token(config, dense=kind).values()) for kind in (False, True))
        sequence = 4096 * (v3.num_moe_layers * moe + v3.num_dense_layers * dense) / 2**30
        assert f"{name} {sequence:.1f} GiB" in text
    assert fp8["attention's output"] == 128 * 128 * 1.5 + 128 * 4
    assert fp8["routed: SwiGLU's input"] == 8 * (4096 + 32 * 4)
