"""Training and generation speed of the reference model against transformers' DeepseekV3, same shape, same process.

    python -m bench.transformers_baseline [NAME] [--rows 16] [--seq 256] [--threads N] [--seconds 10] [--json FILE]
        [model.key=value ...]

Training: forward and backward of the next-token loss, optimizer excluded, MTP and the balance loss off on our side
because transformers trains neither. Generation: greedy, latent cache on both sides, short and long prompts (reading them
included): transformers expands the cached latents into keys and values of every head at each step, the absorbed form does
not, so the longer the context the more it wins.
The two take turns, so that a busy machine slows both; the median of each is reported. Equal weights, and the two losses
are compared first: a fast wrong model would not be a result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.configs import get_config, parse_overrides
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.hf import hf_config, to_hf_state_dict
from examples.model.transformer import Transformer
from examples.rollout.generate import generate


def build(config: ModelConfig) -> tuple[Transformer, Any]:
    """Our model and transformers' with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    ours = Transformer(config)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(config)))
    theirs.to(ours.embed.weight.dtype)
    state = to_hf_state_dict(ours)
    with torch.no_grad():
        for name, view in hf_views_of(theirs.state_dict()).items():
            view.copy_(state[name])
    return ours, theirs


def hf_views_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' model by their names in a checkpoint, without a copy: in memory it fuses the experts."""
    views = {}
    for name, tensor in tensors.items():
        base, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            views[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for e, expert in enumerate(tensor):
            for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
                views[f"{base}.{e}.{part}.weight"] = view
    return views


def training(ours: Transformer, theirs: Any, tokens: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """One forward and backward of each; they return the loss."""

    def step_ours() -> torch.Tensor:
        ours.zero_grad(set_to_none=True)
        loss = ours.loss(tokens, mtp_weight=0.0, balance_alpha=0.0).loss
        loss.backward()
        return loss.detach()

    def step_theirs() -> torch.Tensor:
        theirs.zero_grad(set_to_none=True)
        logits = theirs(tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    return {"ours": step_ours, "transformers": step_theirs}


def generation(
    ours: Transformer, theirs: Any, prompt: torch.Tensor, count: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Greedy generation of `count` tokens by each, as users call it; they return the new tokens."""
    prompts = prompt.tolist()

    def run_ours() -> torch.Tensor:
        return torch.tensor(generate(ours, prompts, count).tokens)

    def run_theirs() -> torch.Tensor:
        mask = torch.ones_like(prompt)
        out = theirs.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=None,
        )
        return out[:, prompt.shape[1] :]

    return {"ours": run_ours, "transformers": run_theirs}


def take_turns(
    candidates: dict[str, Callable[[], torch.Tensor]], seconds: float
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Run the candidates alternately until the time is up (at least 3 rounds after one to warm up)."""
    results = {name: run() for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 3:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times, results


def summary(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens per second from the medians, and the ratio of each turn."""
    rate = {name: tokens / statistics.median(values) for name, values in times.items()}
    turns = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
    return {
        "ours_tokens_per_s": rate["ours"],
        "transformers_tokens_per_s": rate["transformers"],
        "ratio": statistics.median(turns),
        "ratio_worst_turn": min(turns),
        "turns": len(turns),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = argparse.ArgumentParser(prog="python -m bench.transformers_baseline", description=__doc__)
    arguments.add_argument("name", nargs="?", default="tiny", help="configuration")
    arguments.add_argument("overrides", nargs="*", metavar="model.key=value")
    arguments.add_argument("--rows", type=int, default=16)
    arguments.add_argument("--seq", type=int, default=256)
    arguments.add_argument("--prompts", type=int, nargs="+", default=[1, 16], help="rows of generation")
    arguments.add_argument(
        "--context", type=int, nargs="+", default=[32, 256, 1024], help="tokens of each prompt of generation"
    )
    arguments.add_argument("--new", type=int, default=48, help="tokens to generate")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--seconds", type=float, default=10.0, help="per measurement")
    arguments.add_argument("--json", type=Path, help="also write the result here")
    options = arguments.parse_intermixed_args(argv)
    try:
        config = parse_overrides(get_config(options.name), options.overrides).model
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    config = replace(
        config,
        mtp_depth=0,
        max_positions=max(config.max_positions, options.seq, max(options.context) + options.new),
    )
    ours, theirs = build(config)

    tokens = torch.randint(0, config.vocab_size, (options.rows, options.seq + 1))
    times, losses = take_turns(training(ours, theirs, tokens), options.seconds)
    if abs(float(losses["ours"] - losses["transformers"])) > 1e-2:
        print(f"error: the two models disagree: losses {losses}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "config": options.name,
        "overrides": options.overrides,
        "parameters": ours.num_parameters(),
        "precision": config.precision,
        "rows": options.rows,
        "seq": options.seq,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "train": summary(times, options.rows * options.seq),
    }
    ours.eval()
    theirs.eval()
    for context, rows in itertools.product(options.context, options.prompts):
        prompt = torch.randint(2, config.vocab_size, (rows, context))
        times, new = take_turns(generation(ours, theirs, prompt, options.new), options.seconds)
        row = summary(times, rows * options.new)
        row["same_tokens"] = float((new["ours"] == new["transformers"]).double().mean())
        result[f"generate {rows} x {context}"] = row

    print(f"{config.hidden_size=} {config.precision} {ours.num_parameters() / 1e6:.2f}M parameters", end=", ")
    print(f"{options.threads} thread(s), rows of {options.seq} x {options.rows}")
    print(f"{'':22}{'ours':>12}{'transformers':>14}{'ratio':>8}{'worst':>8}   (tokens/s)")
    for name, row in result.items():
        if isinstance(row, dict):
            rates = f"{row['ours_tokens_per_s']:12.0f}{row['transformers_tokens_per_s']:14.0f}"
            print(f"{name:22}{rates}{row['ratio']:8.2f}{row['ratio_worst_turn']:8.2f}")
    ratios = [row["ratio"] for name, row in result.items() if name.startswith("generate")]
    result["generate_geometric_mean"] = statistics.geometric_mean(ratios)
    print(f"generation, geometric mean of the cases: {result['generate_geometric_mean']:.2f}x")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
