"""Groups of sampled outputs for reinforcement learning, with what their training needs: log-probabilities and experts.

Prompts are read once; then all outputs of all prompts are one batch on the latent cache, and a row that has ended leaves it.
The draws are a function of (weights, prompts, seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.generate import pad_prompts
from examples.rollout.replay import FREE, main_routers, recording


@dataclass
class Rollout:
    """One output. tokens: up to and including eos, if `ended`; else it was cut at the limit.

    logprobs: of each token at the temperature of sampling, as the sampler saw it: fp32 [len(tokens)]. routes: int16 [layers with
    experts, len(prompt) + len(tokens) - 1, k], the experts of every token that was fed (the last one never is). entropy:
    of the distributions that the tokens were drawn from, summed.
    """

    prompt: list[int]
    tokens: list[int]
    ended: bool
    logprobs: torch.Tensor
    routes: torch.Tensor
    entropy: float = 0.0


@torch.no_grad()
def sample_groups(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group: int,
    max_new_tokens: int,
    *,
    eos: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Rollout]:
    """`group` outputs of each prompt, prompt by prompt, sampled from the whole distribution."""
    if temperature <= 0 or group < 1:
        raise UserError(f"temperature, group: must be above 0 and at least 1; got {temperature}, {group}")
    rows = [list(prompt) for prompt in prompts for _ in range(group)]
    tokens, lengths = pad_prompts(model, prompts, max_new_tokens)
    device, was_training = tokens.device, model.training
    model.eval()
    longest = tokens.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(len(prompts), longest + max_new_tokens, drafts=False)
    layers, k = len(main_routers(model)), model.config.top_k
    routes = torch.full((layers, len(prompts), longest + max_new_tokens, k), FREE, dtype=torch.int16)
    new = torch.zeros(len(rows), max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    entropy = torch.zeros(len(rows), device=device)
    count = torch.zeros(len(rows), dtype=torch.int64, device=device)
    running = torch.arange(len(rows), device=device)
    with recording(model) as taken:
        logits = model.prefill(tokens, cache, lengths).logits[:, -1]
        fed = (torch.arange(longest, device=device) < lengths[:, None]).nonzero(as_tuple=True)
        note(routes, taken, fed)
        # A prompt is read once; from here on each of its outputs goes its own way.
        cache, logits, routes = (
            cache.repeat(group),
            logits.repeat_interleave(group, 0),
            routes.repeat_interleave(group, 1),
        )
        lengths = lengths.repeat_interleave(group)
        for step in range(max_new_tokens):
            scores = torch.log_softmax(logits / temperature, -1)
            probability = scores.exp()
            entropy[running] -= (probability * scores).sum(-1)
            chosen = draw(probability, generator)
            new[running, step] = chosen[:, 0]
            logprobs[running, step] = scores.gather(1, chosen)[:, 0]
            count[running] = step + 1
            going = (chosen[:, 0] != eos).nonzero()[:, 0]
            if not len(going) or step + 1 == max_new_tokens:
                break
            if len(going) < len(running):
                cache.keep(going)
                running, chosen = running[going], chosen[going]
            fed = (running, lengths[running] + step)
            logits = model.decode_step(chosen, cache).logits[:, -1]
            note(routes, taken, fed)
    model.train(was_training)
    outputs = []
    for row, (prompt, n, spread) in enumerate(zip(rows, count.tolist(), entropy.tolist(), strict=True)):
        text = new[row, :n].tolist()
        outputs.append(
            Rollout(
                prompt,
                text,
                text[-1] == eos,
                logprobs[row, :n].float().cpu(),
                routes[:, row, : len(prompt) + n - 1],
                spread,
            )
        )
    return outputs


def note(
    routes: torch.Tensor, taken: Sequence[list[torch.Tensor]], fed: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Move what one pass was recorded to choose into `routes`, for the (rows, positions) that it was fed."""
    row, position = (index.cpu() for index in fed)
    for layer, passes in enumerate(taken):
        routes[layer, row, position] = passes.pop().short().cpu()


def draw(probability: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index [B, 1] per row of [B, V], by its cumulated mass: one random number a row, where `multinomial` takes V."""
    mass = probability.cumsum(-1)
    total = mass[:, -1:]
    target = torch.rand(total.shape, generator=generator, device=total.device) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # The first index whose mass passes the target has mass of its own, for the target is below the total.
    return torch.searchsorted(mass, target, right=True)
