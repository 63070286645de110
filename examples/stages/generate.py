"""Text from the trained model, with and without speculative decoding, which must agree token for token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from examples.data.shards import ShardReader
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import generate
from examples.rollout.speculative import generate_speculative
from examples.stages.stage import Context
from examples.stages.tokenize import open_data
from examples.train.loop import Trainer

PROMPTS_PER_SOURCE = 16
PROMPT_TOKENS = 48
NEW_TOKENS = 64


def run(context: Context) -> dict[str, Any]:
    """Continue held-out documents greedily, both ways, and sample once from each source."""
    tokenizer, train, val = open_data(context.root)
    model = Trainer(context.config, context.root / "pretrain", train, val).model.eval()
    prompts = {name: held_out_prompts(reader) for name, reader in val.items()}
    flat = [prompt for group in prompts.values() for prompt in group]
    if not flat:
        raise UserError(f"held-out documents: none has {PROMPT_TOKENS} tokens; there is nothing to continue")

    start = time.perf_counter()
    plain = generate(model, flat, NEW_TOKENS, eos=tokenizer.eos_id, batch_invariant=True)
    plain_seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "prompts": len(flat),
        "new_tokens": plain.count,
        "plain_steps": plain.steps,
        "plain_tokens_per_second": plain.count / plain_seconds,
    }
    if model.config.mtp_depth:
        start = time.perf_counter()
        speculative = generate_speculative(
            model, flat, NEW_TOKENS, eos=tokenizer.eos_id, batch_invariant=True
        )
        seconds = time.perf_counter() - start
        result |= {
            "speculative_steps": speculative.steps,
            "speculative_tokens_per_second": speculative.count / seconds,
            "acceptance": speculative.acceptance,
            # A pass of a row gives one token, and one more if its draft was right.
            "tokens_per_pass": 1 + speculative.acceptance,
            "acceptance_by_source": acceptance_by_source(model, prompts, tokenizer.eos_id),
            "equals_greedy": speculative.tokens == plain.tokens,
        }
        if not result["equals_greedy"]:
            result["difference"] = first_difference(model, flat, plain.tokens, speculative.tokens)
        print(
            f"  MTP acceptance {speculative.acceptance:.1%}, {result['tokens_per_pass']:.2f} tokens a pass; "
            f"{result['speculative_tokens_per_second']:.0f} against {result['plain_tokens_per_second']:.0f} tokens/s; "
            f"output {'equals' if result['equals_greedy'] else 'DIFFERS FROM'} greedy",
            flush=True,
        )
    result["samples"] = samples(model, prompts, tokenizer)
    for sample in result["samples"]:
        print(f"  [{sample['source']}] ...{sample['prompt'][-60:]!r} -> {sample['text'][:100]!r}", flush=True)
    return result


@torch.no_grad()
def first_difference(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Sequence[int]],
    speculative: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Where the two part ways: how many prompts, and in the first of them the token and both choices' logits, which one pass
    over all before gives. Passes of other shapes round differently; in bf16 that decides between logits an ulp apart."""
    different = [i for i, (a, b) in enumerate(zip(plain, speculative, strict=True)) if a != b]
    number = different[0]
    a, b = plain[number], speculative[number]
    at = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
    logits = model.logits(torch.tensor([[*prompts[number], *a[:at]]]))[0, -1].float()
    return {
        "prompts": len(different),
        "prompt": number,
        "token": at,
        "logits": [float(logits[tokens[at]]) for tokens in (a, b) if at < len(tokens)],
    }


def held_out_prompts(reader: ShardReader) -> list[list[int]]:
    """The first tokens of held-out documents that are long enough."""
    prompts = []
    for i in range(len(reader)):
        if reader.length(i) > PROMPT_TOKENS:
            prompts.append(reader.document(i)[:PROMPT_TOKENS].tolist())
        if len(prompts) == PROMPTS_PER_SOURCE:
            break
    return prompts


def acceptance_by_source(
    model: Transformer, prompts: dict[str, list[list[int]]], eos: int
) -> dict[str, float]:
    """Share of accepted drafts for each source."""
    return {
        name: generate_speculative(model, group, NEW_TOKENS, eos=eos).acceptance
        for name, group in prompts.items()
        if group
    }


def samples(model: Transformer, prompts: dict[str, list[list[int]]], tokenizer: Any) -> list[dict[str, str]]:
    """One sampled continuation per source, at temperature 0.8."""
    names = [name for name, group in prompts.items() if group]
    first = [prompts[name][0] for name in names]
    with torch.random.fork_rng(devices=[]):
        drawn = generate(model, first, NEW_TOKENS, eos=tokenizer.eos_id, temperature=0.8, top_p=0.95)
    return [
        {"source": name, "prompt": tokenizer.decode(prompt, skip_special=True), "text": tokenizer.decode(new)}
        for name, prompt, new in zip(names, first, drawn.tokens, strict=True)
    ]
