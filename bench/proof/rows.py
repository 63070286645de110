"""Rows of a benchmark: what a kernel and its baselines took at one shape, and whether the results were right.

A row is {"kernel", "shape", "candidates": {name: what bench/proof/measure.py found, "tflops", "gbps", "correct", ...}},
with "input_bytes" where a claim asks for a size and "floor_us" where a bound is known. "ours" is the kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops._registry import absent_reason

from .claims import nominal_bandwidth
from .steps import Data

Row = dict[str, Any]
Call = Callable[[], Any]
Floor = dict[str, float]  # microseconds that no version can beat, by cause

# An H100 SXM by its data sheet: a bound, not a promise.
GBPS, MULTIPROCESSORS, BOOST_GHZ = 3352, 132, 1.755
FP8_FLOP, BF16_FLOP = 8192, 4096  # of a multiprocessor's tensor cores, each clock
ROUNDED_BF16 = 4e-3  # relative RMS error of a right bf16 result; rounding alone is 1.1e-3 to 1.7e-3
EXACT_FP8 = 3e-4  # and of an fp32 result of the FP8 products: docs/numerics.md


def on(backend: str, call: Call) -> Call:
    """The call on a backend."""

    def run() -> Any:
        with deepseek_ops.backend(backend):
            return call()

    return run


def copy_of(size: int) -> Call:
    """A copy that reads and writes `size` bytes in all: the ceiling that memory allows on this machine."""
    source = torch.randint(0, 255, (max(size // 2, 1),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """Outputs of an op as a tuple."""
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


# ---- right or wrong ------------------------------------------------------------------------------------------------


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (x, y)))


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """Of the error, against the exact values."""
    return float(((got.double() - exact).square().mean() / exact.square().mean()).sqrt())


def difference(got: Any, want: Any, share: float = 0.0) -> str:
    """What is wrong with the outputs of an op, "" if nothing.

    share: 0 asks for every value, the sign of zero too; any NaN is a NaN. Otherwise rounding may differ, as it does where
    the device's e^x or 1/sqrt is not the model's: so many elements of 16 bits or less may have another value (two, in
    a small output), and the error's norm stays below 2^-8 of the result's; below 2^-16 in fp32.
    """
    pairs = list(zip(tensors(got), tensors(want), strict=True))
    for index, (a, b) in enumerate(pairs):
        where = f"output {index}" if len(pairs) > 1 else "the result"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{where} is {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{where} differs"
            continue
        x, y = a.double(), b.double()
        if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x.isinf(), y.isinf()):
            return f"{where} has NaN or Inf elsewhere"
        x, y = (torch.where(t.isfinite(), t, t.sign().nan_to_num()) for t in (x, y))
        other = int(((x != y) | (x.signbit() != y.signbit())).sum())
        if share == 0.0:
            if other:
                return f"{where} differs in {other} of {x.numel()} elements"
            continue
        narrow = a.element_size() <= 2
        if narrow and other > max(2.0, share * x.numel()):
            return f"{where} differs in {other} of {x.numel()} elements"
        error = float((x - y).norm()) / max(float(y.norm()), 1e-30)
        if error > (2.0**-8 if narrow else 2.0**-16):
            return f"{where} has an error of {error:.1e} of its norm"
    return ""


# ---- figures -------------------------------------------------------------------------------------------------------


def add_rates(timed: dict[str, Data], flop: float = 0.0, size: float = 0.0) -> None:
    """TFLOP/s and GB/s of every candidate that ran, for the work that the op must do."""
    for result in timed.values():
        if "median_us" not in result:
            continue
        if flop:
            result["tflops"] = round(1e-6 * flop / result["median_us"], 2)
            if "sustained" in result:
                result["sustained_tflops"] = round(1e-6 * flop / result["sustained"]["mean_us"], 2)
        if size:
            result["gbps"] = round(1e-3 * size / result["median_us"], 1)


def product_floor(
    flop: float, size: float, flop_per_clock: int, gbps: float = GBPS, sms: float = MULTIPROCESSORS
) -> Floor:
    """Of a product: its arithmetic at the boost clock, its bytes at the data sheet's bandwidth."""
    return {"flops": flop / (sms * flop_per_clock * BOOST_GHZ * 1e3), "bytes": size / (gbps * 1e3)}


def this_card() -> tuple[float, int]:
    """Bandwidth of the data sheet in GB/s, an H100's where unknown, and multiprocessors."""
    properties = torch.cuda.get_device_properties(0)
    return nominal_bandwidth(properties.name) or GBPS, properties.multi_processor_count


def line(row: Row) -> str:
    """One row in words: ours, the floor, and how many times longer the others took."""
    ours, name = row["candidates"]["ours"], f"{row['kernel']} {row['shape']}"
    if "median_us" not in ours:
        return f"{name} absent: {ours.get('absent', '')}"
    rates = [
        f"{ours[key]:.0f} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")) if key in ours
    ]
    floor = max(row.get("floor_us", {}).values(), default=0.0)
    others = [
        f"{other['median_us'] / ours['median_us']:.2f}x {key}"
        for key, other in row["candidates"].items()
        if key != "ours" and "median_us" in other
    ]
    text = [
        f"{name} {ours['median_us']:.1f} us",
        *rates[:1],
        *([f"floor {floor:.1f} us"] if floor else []),
        *others,
    ]
    return ", ".join(text) + ("  WRONG" if ours.get("correct") is False else "")


def step(rows: list[Row]) -> Data:
    """What a benchmark step finds."""
    name = torch.cuda.get_device_name()
    absent = next((line(row) for row in rows if "median_us" not in row["candidates"].get("ours", row)), "")
    return {
        "rows": rows,
        "nominal_gbps": nominal_bandwidth(name),
        "summary": absent or "; ".join(line(row) for row in rows),
    }


# ---- the command line of a benchmark ---------------------------------------------------------------------------------


def command(
    module: str,
    about: str | None,
    cases: Callable[[bool], Sequence[Any]],
    measure: Callable[[Any], Row],
    floor_us: Callable[[Any], Floor],
    arguments: list[str] | None = None,
) -> int:
    """`python -m bench.<name>`: floors, and what this GPU makes of them. A case is anything with a `name`.

    cases: all of them, or a few for --quick. Exit status 1 where a result is wrong; 0 without a GPU, which is said.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with these words in their line")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases(options.quick) if options.only in case.name]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name")
    reason = absent_reason("cuda")
    if reason:
        print(f"no GPU to measure on: backend 'cuda' is absent here: {reason}")
        print(f"floors in microseconds, H100 SXM ({GBPS} GB/s, {BOOST_GHZ} GHz):")
        for case in chosen:
            print(f"{case.name:<46} " + "  ".join(f"{k} {v:9.1f}" for k, v in floor_us(case).items()))
        return 0
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; medians, cold L2")
    rows = []
    for case in chosen:
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if options.json is not None:
        record = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(row["candidates"]["ours"].get("correct") is False for row in rows) else 0
