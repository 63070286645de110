"""What one layer keeps for its backward pass, in bytes per token, tensor by tensor (report sections 3.2.3 and 3.3.3).

    python -m examples.model.memory [config]      the table of docs/memory.md, for another model

`kept_per_token` states it as formulas; tests/examples/model/test_memory.py measures a layer and demands these numbers. Parameters, their FP8
copies and what does not grow with tokens are not counted.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from examples.model.config import ModelConfig


def _fp8(width: int, bits: int = 8) -> float:
    """Bytes of one row of FP8 (or E5M6) with its scales."""
    return width * bits / 8 + 4 * -(-width // 128)


def kept_per_token(config: ModelConfig, *, dense: bool = False) -> dict[str, float]:
    """Bytes that one layer of `config` keeps for each token, by tensor; 0 where it is computed again."""
    c, wide = config, 4 if config.precision == "fp32" else 2
    fp8, again = c.precision == "fp8", c.recompute
    heads, q_rank = c.num_heads, c.q_lora_rank or 0
    hidden = c.hidden_size
    inner = c.dense_inner_size if dense else c.num_shared_experts * c.expert_inner_size

    def cached(width: int) -> float:
        """An input of a Linear that is cheap to make again."""
        return _fp8(width) if fp8 else 0 if again else wide * width

    # Uncompressed queries are not normed: only making them again needs them.
    down = (q_rank or (heads * c.qk_head_dim if again else 0)) + c.latent_width
    expanded = heads * c.qk_head_dim + heads * (c.qk_nope_head_dim + c.v_head_dim) + c.qk_rope_head_dim
    out = heads * c.v_head_dim
    table = {
        "residual before attention, 1 / rms": wide * hidden + 4,
        "attention norm's output": cached(hidden),
        "compressed queries, keys and values, 1 / rms": wide * down + (8 if q_rank else 4),
        "their norms' outputs": (cached(q_rank) if q_rank else 0) + cached(c.kv_lora_rank),
        "queries, keys and values of all heads": 0 if again else wide * expanded,
        "attention's output": _fp8(out, 12) if fp8 else wide * out,
        "log of the softmax sums": 4 * heads,
        "residual before the FFN, 1 / rms": wide * hidden + 4,
        "FFN norm's output": cached(hidden),
    }
    if not dense:
        k, each = c.top_k, c.expert_inner_size
        table |= {
            "affinities": 4 * c.num_experts,
            "routing: choices, places, gates": (8 + 8 + 4) * k,
            "rows of the routed experts": 0 if fp8 else k * wide * hidden,
            "routed: SwiGLU's input": k * (_fp8(2 * each) if fp8 else wide * 2 * each),
            "routed: SwiGLU's output": 0 if fp8 or again else k * wide * each,
        }
    name = "dense" if dense else "shared"
    table[f"{name}: SwiGLU's input"] = _fp8(2 * inner) if fp8 else wide * 2 * inner
    table[f"{name}: SwiGLU's output"] = 0 if fp8 or again else wide * inner
    return table


VARIANTS = {
    "BF16": {"precision": "bf16", "recompute": False},
    "BF16, recomputing": {"precision": "bf16", "recompute": True},
    "FP8, recomputing": {"precision": "fp8", "recompute": True},
}


def table(config: ModelConfig, *, dense: bool = False) -> str:
    """Markdown: bytes per token and layer, for BF16 with and without the report's recomputation, and for FP8 with it."""
    columns = [kept_per_token(replace(config, **changes), dense=dense) for changes in VARIANTS.values()]
    lines = [f"| kept for backward | {' | '.join(VARIANTS)} |", "|---|---:|---:|---:|"]
    for name in columns[0]:
        lines.append(f"| {name} | {' | '.join(f'{column[name]:,.0f}' for column in columns)} |")
    totals = [sum(column.values()) for column in columns]
    lines.append(f"| **sum** | {' | '.join(f'**{total:,.0f}**' for total in totals)} |")
    lines.append(f"| of BF16 | {' | '.join(f'{100 * total / totals[0]:.0f} %' for total in totals)} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables of one configuration."""
    from examples.configs import get_config

    model = get_config(sys.argv[1] if len(sys.argv) > 1 else "v3_671b").model
    print(f"{table(model)}\n\n{table(model, dense=True)}")


if __name__ == "__main__":
    main()
