"""The quantiser kernels on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.quantize [--quick] [--op NAME] [--repeats 30] [--json FILE]

For each op and shape, in one process and in turns, on random data with a cold L2 (a buffer larger than the L2 is written
before every run):

- ours      the op through its public function, allocation of the outputs included in the stream, not in the time
- copy      `copy_` of a tensor that moves as many bytes: the ceiling that memory allows on this machine
- eager     the PyTorch reference on the same GPU

The floor is what any version must read and write: input once, codes once, scales once. The bytes of ours are compared
with eager's before anything is timed. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops import quantize as quant
from deepseek_ops._checks import ceil_div
from deepseek_ops._registry import absent_reason

TOKENS = (128, 4096, 16384, 65536)
HIDDEN = (2048, 4096, 7168, 18432)
# (N, K) of the model's weights: research/gemm-quant.md section 7.5.
WEIGHTS = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (36864, 7168),
    (7168, 18432),
    (4096, 7168),
)
LARGE = 64 << 20  # bytes of input from which the targets count
TARGETS = {
    "rows": 0.90,
    "columns": 0.85,
    "both": 0.85,
    "blocks": 0.90,
    "transpose": 0.85,
    "requantise": 0.80,
    "pack": 0.88,
    "pack_row": 0.88,
    "unpack": 0.88,
    "turn": 0.80,
    "values_rows": 0.88,
    "values_columns": 0.80,
    "values_blocks": 0.88,
}


@dataclass(frozen=True)
class Case:
    """One op on one input."""

    op: str
    dtype: str
    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.rows}x{self.columns}"

    @property
    def input_bytes(self) -> int:
        elements = self.rows * self.columns
        return (
            elements * 3 // 2
            if self.dtype == "e5m6"
            else elements * {"bf16": 2, "fp32": 4, "e4m3": 1}[self.dtype]
        )


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

    @property
    def of_copy(self) -> float:
        """Speed as a part of the copy's."""
        return self.copy_us / self.ours_us


def floor_bytes(case: Case) -> int:
    """Bytes that any implementation reads and writes: input, codes and scales, each once."""
    elements = case.rows * case.columns
    row_scales = 4 * case.rows * ceil_div(case.columns, 128)
    column_scales = 4 * case.columns * ceil_div(case.rows, 128)
    block_scales = 4 * ceil_div(case.rows, 128) * ceil_div(case.columns, 128)
    padded = ceil_div(case.rows, 128) * 128 * case.columns
    outputs = {
        "rows": elements + row_scales,
        "columns": padded + column_scales,
        "both": elements + row_scales + padded + column_scales,
        "blocks": elements + block_scales,
        "transpose": elements + 2 * block_scales,
        "requantise": padded + row_scales + column_scales,
        "pack": elements * 3 // 2 + row_scales,
        "pack_row": elements * 3 // 2 + 4 * case.rows,
        "unpack": 2 * elements + row_scales,
        "turn": padded + row_scales + column_scales,
        "values_rows": 2 * elements + row_scales,
        "values_columns": 2 * elements + column_scales,
        "values_blocks": 2 * elements + block_scales,
    }
    return case.input_bytes + outputs[case.op]


def cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """Activations for the 1 x 128 and 128 x 1 ops, weights for the blocks."""
    tokens, hidden = (TOKENS[:3:2], HIDDEN[2:3]) if quick else (TOKENS, HIDDEN)
    weights = WEIGHTS[:2] if quick else WEIGHTS
    found = []
    for op in ops:
        shapes = (
            weights
            if op in ("blocks", "transpose", "values_blocks")
            else [(t, h) for t in tokens for h in hidden]
        )
        dtypes = {"blocks": ("bf16", "fp32"), "transpose": ("e4m3",), "requantise": ("e4m3",)}.get(
            op,
            ("e5m6",) if op in ("unpack", "turn") else ("e4m3",) if op.startswith("values") else ("bf16",),
        )
        found += [Case(op, dtype, *shape) for dtype in dtypes for shape in shapes]
    return found


def call_of(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """The op on random data."""
    dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
    x = torch.randn(case.rows, case.columns, device="cuda", dtype=dtype)
    if case.op in ("unpack", "turn"):
        packed, scale = quant.pack_e5m6(x)
        if case.op == "turn":
            return lambda: quant.requantize_e5m6_128x1(packed, scale, case.columns)
        return lambda: (quant.unpack_e5m6(packed, scale, case.columns),)
    if case.op == "pack_row":
        return lambda: quant.pack_e5m6(x, granularity="row")
    if case.op.startswith("values"):
        return values_of(case.op, x)
    if case.op == "transpose":
        q, scale = quant.quantize_128x128(x)
        return lambda: quant.transpose_128x128(q, scale)
    if case.op == "requantise":
        q, scale = quant.quantize_1x128(x, pow2=True)
        return lambda: quant.requantize_128x1(q, scale)
    function = {
        "rows": quant.quantize_1x128,
        "columns": quant.quantize_128x1,
        "both": quant.quantize_1x128_128x1,
        "blocks": quant.quantize_128x128,
        "pack": quant.pack_e5m6,
    }[case.op]
    return lambda: function(x)


def values_of(op: str, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Dequantisation to bf16."""
    bf16 = torch.bfloat16
    if op == "values_rows":
        q, scale = quant.quantize_1x128(x)
        return lambda: (quant.dequantize_1x128(q, scale, dtype=bf16),)
    if op == "values_columns":
        q_t, scale_t = quant.quantize_128x1(x)
        return lambda: (quant.dequantize_128x1(q_t, scale_t, x.shape[0], dtype=bf16),)
    q_b, scale_b = quant.quantize_128x128(x)
    return lambda: (quant.dequantize_128x128(q_b, scale_b, dtype=bf16),)


def copy_of(size: int) -> Callable[[], Tensor]:
    """A copy that reads and writes `size` bytes in all."""
    source = torch.randint(0, 255, (max(size // 2, 1),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Stopwatch:
    """Times single calls on the stream with a cold L2."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def microseconds(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # also keeps the GPU busy while the host prepares the call
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1000 * begin.elapsed_time(end)


def clocks() -> tuple[int | None, float | None]:
    """SM clock in MHz and power in W, now, if nvidia-smi tells."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None, None
    query = [smi, "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    try:
        clock, power = answer.stdout.strip().split(",")
        return int(clock), float(power)
    except ValueError:
        return None, None


def eager(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The same call on the PyTorch reference."""

    def run() -> tuple[Tensor, ...]:
        with deepseek_ops.backend("reference"):
            return call()

    return run


def check_equal(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Refuse to time wrong bytes."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise SystemExit(f"{name}: output {index} differs from the reference; nothing was timed")


def measure(case: Case, repeats: int, watch: Stopwatch) -> Result:
    """The op, the copy and eager in turns, so that a change of clock meets all of them."""
    ours = call_of(case)
    baseline, copy = eager(ours), copy_of(floor_bytes(case))
    check_equal(case.name, ours(), baseline())
    times: dict[str, list[float]] = {"ours": [], "copy": [], "eager": []}
    for repeat in range(repeats + 3):
        for key, call in (("ours", ours), ("copy", copy), ("eager", baseline)):
            elapsed = watch.microseconds(call)
            if repeat >= 3:
                times[key].append(elapsed)
    clock, power = clocks()
    deciles = statistics.quantiles(times["ours"], n=10)
    return Result(
        case,
        floor_bytes(case),
        statistics.median(times["ours"]),
        deciles[0],
        deciles[-1],
        statistics.median(times["copy"]),
        statistics.median(times["eager"]),
        clock,
        power,
    )


def line(result: Result) -> str:
    """One row of the table."""
    case = result.case
    rate = result.floor_bytes / result.ours_us / 1000
    target = TARGETS[case.op] if case.input_bytes >= LARGE else None
    verdict = (
        "" if target is None else f"target {target:.2f} {'met' if result.of_copy >= target else 'missed'}"
    )
    return (
        f"{case.name:<32} {result.ours_us:9.1f} us {rate:7.0f} GB/s  copy {result.copy_us:9.1f} us"
        f" ({result.of_copy:4.2f} of it)  eager {result.eager_us / result.ours_us:5.1f}x  {verdict}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes of each op")
    parser.add_argument("--op", choices=sorted(TARGETS), action="append", help="only this op (repeatable)")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: must be at least 2; got {options.repeats}")
    reason = absent_reason("cuda")
    if reason:
        print(f"bench.quantize measures CUDA kernels, and backend 'cuda' is absent here: {reason}")
        return
    torch.manual_seed(0)
    watch = Stopwatch()
    print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; ours / copy / eager, medians, cold L2"
    )
    results = []
    for case in cases(options.op or list(TARGETS), options.quick):
        try:
            results.append(measure(case, options.repeats, watch))
        except torch.cuda.OutOfMemoryError:  # eager needs several copies in fp32
            print(f"{case.name:<32} skipped: the reference does not fit into this GPU's memory")
            continue
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
    if options.json is not None:
        record = {
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "repeats": options.repeats,
        }
        options.json.write_text(
            json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
