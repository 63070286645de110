"""Continuous batching against one prompt after the other and against static batches: tokens/s and time to first token.

    python -m bench.engine [--run runs/tiny] [--requests 64] [--threads 1]

Requests differ in length of prompt and answer, as users' do: a static batch runs until its longest answer is done, and
nobody in it has a token before its prompts are read together; the engine lets the next request in when one leaves.
All requests are there at the start, every way generates the same greedy answers, and rates count the new tokens that were
asked for. Seconds of this process (`time.process_time`) are printed too: they mean more than the wall's on a shared machine.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from examples.configs import get_config
from examples.model.transformer import Transformer
from examples.rollout.engine import Engine, EngineConfig
from examples.rollout.generate import generate
from examples.rollout.sampling import Sampling

Job = tuple[list[int], int]  # a prompt and how many tokens to answer
Outcome = tuple[list[list[int]], list[float]]  # answers; seconds to each one's first token


def make_jobs(count: int, vocabulary: int, context: int, shared: int) -> list[Job]:
    """Prompts of 8 to 96 tokens behind `shared` common ones, answers of 4 to 96 (few are long: squares of a uniform)."""
    rng = random.Random(0)
    common = [rng.randrange(9, vocabulary) for _ in range(shared)]
    jobs = []
    for _ in range(count):
        own = [rng.randrange(9, vocabulary) for _ in range(rng.randint(8, 96))]
        new = 4 + round(92 * rng.random() ** 2)
        jobs.append(([*common, *own][: context - new - 2], new))
    return jobs


def static(model: Transformer, jobs: list[Job], size: int) -> Outcome:
    """`generate` on batches of `size`, each until its longest answer; 1 is one prompt after the other."""
    start, answers, first = time.perf_counter(), [], []
    read: list[float] = []
    prefill = model.prefill

    def watched(*arguments: object) -> object:
        output = prefill(*arguments)
        read.append(time.perf_counter() - start)  # a first token is its argmax away
        return output

    model.prefill = watched  # of this instance
    try:
        for at in range(0, len(jobs), size):
            batch = jobs[at : at + size]
            longest = max(new for _, new in batch)
            tokens = generate(model, [prompt for prompt, _ in batch], longest).tokens
            answers += [row[:new] for row, (_, new) in zip(tokens, batch, strict=True)]
            first += [read[-1]] * len(batch)
    finally:
        del model.prefill
    return answers, first


def continuous(model: Transformer, jobs: list[Job], config: EngineConfig) -> Outcome:
    """The engine, all jobs submitted at once."""
    engine = Engine(model, config)
    requests = engine.run([prompt for prompt, _ in jobs], [Sampling(new) for _, new in jobs])
    return [r.answer for r in requests], [r.first_token - r.submitted for r in requests]


def measure(
    name: str, way: Callable[[], Outcome], jobs: list[Job], reference: list[list[int]] | None
) -> Outcome:
    """One run, timed and printed; the caller has warmed up."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers, first = way()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(new for _, new in jobs)
    assert [len(a) for a in answers] == [new for _, new in jobs]
    same = (
        ""
        if reference is None
        else f"{sum(a == b for a, b in zip(answers, reference, strict=True))}/{len(jobs)}"
    )
    first.sort()
    print(
        f"{name:34} {tokens / wall:9.0f} {tokens / cpu:9.0f}   {statistics.median(first) * 1e3:8.0f} "
        f"{first[int(0.95 * (len(first) - 1))] * 1e3:8.0f}   {same}",
        flush=True,
    )
    return answers, first


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="a trained run folder (default: tiny with random weights)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.run:
        from examples.rollout.load import load_run

        model = load_run(options.run).model
    else:
        torch.manual_seed(0)
        model = Transformer(get_config("tiny").model).eval()
    jobs = make_jobs(options.requests, model.config.vocab_size, model.config.max_positions, options.shared)
    load = torch.tensor([len(prompt) for prompt, _ in jobs]).float().mean()
    print(f"{_processor()}, torch {torch.__version__}, {options.threads} threads, {model.config.precision}")
    print(
        f"{len(jobs)} requests, {load:.0f} tokens of prompt and {sum(n for _, n in jobs) / len(jobs):.0f} new ones on average"
    )
    print(f"{'':34} {'tokens/s':>9} {'per cpu-s':>9}   {'first, ms':>8} {'p95':>8}   equal to one by one")
    for way in (lambda: static(model, jobs[:2], 1), lambda: continuous(model, jobs[:4], EngineConfig())):
        way()  # plans, tables, allocators
    reference, _ = measure("one by one", lambda: static(model, jobs, 1), jobs, None)
    for size in (8, 32):
        measure(f"static batches of {size}", lambda size=size: static(model, jobs, size), jobs, reference)
    for name, changes in (
        ("continuous, 8 at once", {"max_running": 8}),
        ("continuous, 32 at once", {}),
        ("  attention's bits invariant", {"invariance": "attention"}),
        ("  all bits invariant", {"invariance": "full"}),
        ("  MTP speculation", {"speculative": True}),
    ):
        config = EngineConfig(**{"max_running": 32, "invariance": "none", "pages": 512, **changes})
        measure(name, lambda config=config: continuous(model, jobs, config), jobs, reference)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
