"""The kernels of the MoE layer's plumbing on a Hopper GPU: bytes per second against the floor, a copy and eager PyTorch.

    python -m bench.moe [--quick] [--op NAME] [--repeats 30] [--json FILE]

The shapes are DeepSeek-V3's: 256 experts in 8 groups of which 4 are open, 8 experts a token, hidden size 7168. As in
bench/quantize.py each op, a copy of as many bytes and the PyTorch reference take turns in one process, with a cold L2.
The floor is what any version must read and write once; a token's row is read once and written 8 times. Results are
compared with the reference before anything is timed. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quantize import Stopwatch, clocks, copy_of, eager
from deepseek_ops import moe, quantize
from deepseek_ops._registry import absent_reason

EXPERTS, GROUPS, TOP_GROUPS, TOP_K, HIDDEN = 256, 8, 4, 8, 7168
SEQUENCE = 4096  # tokens, for the balance loss
TOKENS = (128, 4096, 16384, 65536)
ROUTER = ("route", "route_backward", "balance_loss", "update_bias_")
ROWS = ("permute", "permute_quantized", "unpermute", "unpermute_backward")
OPS = (*ROUTER, *ROWS)
LARGE = 64 << 20  # bytes of input from which the targets count
TARGETS = {"route": 0.70, "route_backward": 0.80, "balance_loss": 0.60, **dict.fromkeys(ROWS, 0.85)}


@dataclass(frozen=True)
class Case:
    """One op on so many tokens."""

    op: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.tokens}"

    @property
    def input_bytes(self) -> int:
        if self.op == "update_bias_":
            return EXPERTS * 12
        if self.op in ROUTER:
            return self.tokens * EXPERTS * 4
        rows = self.tokens * (TOP_K if self.op.startswith("unpermute") else 1)
        return rows * HIDDEN * (1 if self.op == "permute_quantized" else 2)


def floor_bytes(case: Case) -> int:
    """Bytes that any implementation reads and writes, each once."""
    scores, slots, row = case.tokens * EXPERTS * 4, case.tokens * TOP_K, HIDDEN * 2
    quantized = HIDDEN + HIDDEN // 128 * 4
    return {
        "route": 2 * scores + slots * 12 + EXPERTS * 12,
        "route_backward": 3 * scores + slots * 12,
        "balance_loss": 2 * scores + slots * 8,
        "update_bias_": EXPERTS * 16,
        "permute": (case.tokens + slots) * row + slots * 16,
        "permute_quantized": (case.tokens + slots) * quantized + slots * 16,
        "unpermute": (case.tokens + slots) * row + slots * 12,
        "unpermute_backward": (case.tokens + 2 * slots) * row + slots * 16,
    }[case.op]


def cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """Every op on every number of tokens."""
    return [Case(op, tokens) for op in ops for tokens in (TOKENS[:3:2] if quick else TOKENS)]


def call_of(case: Case) -> Callable[[], Any]:
    """The op on random data."""
    tokens = case.tokens
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    bias = torch.zeros(EXPERTS, device="cuda")

    def route() -> tuple[Tensor, ...]:
        return moe._route(logits, bias, TOP_K, GROUPS, TOP_GROUPS, 2.5, True)  # type: ignore[no-any-return]

    topk_idx, weight, scores, counts = route()
    if case.op == "route":
        return route
    if case.op == "route_backward":
        grads = torch.randn_like(weight), torch.randn_like(scores)
        return lambda: moe._route_backward(*grads, scores, topk_idx, 2.5, True)
    if case.op == "balance_loss":
        cu = torch.arange(0, tokens + 1, min(SEQUENCE, tokens), device="cuda", dtype=torch.int32)
        return lambda: moe._balance_loss(scores, topk_idx, cu, 1e-4, "biased")
    if case.op == "update_bias_":
        return lambda: moe.update_bias_(bias, counts, speed=0.001)
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    if case.op == "permute":
        return lambda: moe._permute(x, topk_idx, EXPERTS)
    if case.op == "permute_quantized":
        q, scale = quantize.quantize_1x128(x, pow2=True)
        return lambda: moe._permute_quantized(q, scale, topk_idx, EXPERTS)
    y, _, source = moe._permute(x, topk_idx, EXPERTS)
    if case.op == "unpermute":
        return lambda: moe._unpermute(y, source, tokens, TOP_K, weight)
    return lambda: moe._unpermute_backward(x, y, source, TOP_K, weight)


def difference(got: Any, want: Any) -> str:
    """What is wrong with a result, "" if nothing: codes and offsets to the byte, floats up to rounding, and choices
    but for one in a thousand, where two scores are neighbours and the device's sigmoid is not torch's."""
    pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True)
    for index, (a, b) in enumerate(pairs):
        if a.dtype == torch.int64 and a.ndim == 2:
            if (a == b).double().mean() < 0.999:
                return f"output {index}: other experts"
        elif a.is_floating_point() and a.element_size() > 1:
            error = (a.double() - b.double()).abs().mean() / b.double().abs().mean().clamp_min(1e-30)
            if not error < 2e-3:
                return f"output {index}: mean error {error:.1e} of the mean"
        elif a.dtype != torch.int64 and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return f"output {index} differs"
    return ""


@dataclass(frozen=True)
class Result:
    """Times in microseconds: median, and the 10th and 90th percentile of ours."""

    case: Case
    floor_bytes: int
    ours_us: float
    ours_p10_us: float
    ours_p90_us: float
    copy_us: float
    eager_us: float
    sm_clock_mhz: int | None
    power_w: float | None


def measure(case: Case, repeats: int, watch: Stopwatch) -> Result:
    """The op, the copy and eager in turns, so that a change of clock meets all of them."""
    ours = call_of(case)
    baseline, copy = eager(ours), copy_of(floor_bytes(case))
    wrong = "" if case.op == "update_bias_" else difference(ours(), baseline())  # that one is in place
    if wrong:
        raise SystemExit(f"{case.name}: {wrong}; nothing was timed")
    times: dict[str, list[float]] = {"ours": [], "copy": [], "eager": []}
    for repeat in range(repeats + 3):
        for key, call in (("ours", ours), ("copy", copy), ("eager", baseline)):
            elapsed = watch.microseconds(call)
            if repeat >= 3:
                times[key].append(elapsed)
    deciles = statistics.quantiles(times["ours"], n=10)
    medians = (statistics.median(times[key]) for key in ("copy", "eager"))
    ours_us = statistics.median(times["ours"])
    return Result(case, floor_bytes(case), ours_us, deciles[0], deciles[-1], *medians, *clocks())


def line(result: Result) -> str:
    """One row of the table."""
    case, share = result.case, result.copy_us / result.ours_us
    target = TARGETS.get(case.op) if case.input_bytes >= LARGE else None
    verdict = "" if target is None else f"target {target:.2f} {'met' if share >= target else 'missed'}"
    return (
        f"{case.name:<26} {result.ours_us:9.1f} us {result.floor_bytes / result.ours_us / 1000:7.0f} GB/s"
        f"  copy {result.copy_us:9.1f} us ({share:4.2f} of it)  eager {result.eager_us / result.ours_us:5.1f}x  {verdict}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two numbers of tokens for each op")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (repeatable)")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: must be at least 2; got {options.repeats}")
    reason = absent_reason("cuda")
    if reason:
        print(f"bench.moe measures CUDA kernels; no GPU kernels run here, backend 'cuda' is absent: {reason}")
        return
    torch.manual_seed(0)
    watch = Stopwatch()
    device = torch.cuda.get_device_name(0)
    print(f"{device}, torch {torch.__version__}; ours / copy / eager, medians, cold L2")
    results = []
    for case in cases(options.op or OPS, options.quick):
        try:
            results.append(measure(case, options.repeats, watch))
        except torch.cuda.OutOfMemoryError:
            print(f"{case.name:<26} skipped: the reference does not fit into this GPU's memory")
            continue
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
    if options.json is not None:
        record = {"device": device, "torch": torch.__version__, "repeats": options.repeats}
        options.json.write_text(
            json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
