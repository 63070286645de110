"""Memory-bound kernels on a Hopper GPU against the bytes that they must move, a copy, and eager PyTorch.

    python -m bench.memory_bound [--quick] [--family NAME] [--kernel NAME] [--repeats 30] [--json FILE]

KERNELS is a table: one line for each kernel, with its floor and its call; a family adds lines. For each kernel and shape,
in one process and in turns, on random data with a cold L2:

- ours      the op through its public function, allocation of the outputs included in the stream, not in the time
- copy      `copy_` of a tensor that moves as many bytes as the floor: the ceiling that memory allows on this machine
- eager     the PyTorch reference on the same GPU

The floor is what any version must read and write, each input and output once. Results are compared with eager's before
anything is timed. Without a Hopper GPU it says so, prints the floors, and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quantize import LARGE, Stopwatch, clocks, copy_of, eager
from deepseek_ops import activation, norm
from deepseek_ops._checks import E4M3
from deepseek_ops._registry import absent_reason
from deepseek_ops.quantize import quantize_1x128

TOKENS = (128, 4096, 16384, 65536)
CODES = 1 + 4 / 128  # bytes of an element in e4m3 with its share of a scale

Call = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """One line of the table.

    columns:  the model's widths (research/gemm-quant.md section 7.5)
    floor:    bytes for each of rows x columns elements
    target:   least part of the copy's speed, on inputs of 64 MB and more
    make:     rows and columns -> the call, on random data that it holds
    """

    family: str
    name: str
    columns: tuple[int, ...]
    floor: float
    target: float
    make: Callable[[int, int], Call]

    def floor_bytes(self, rows: int, columns: int) -> int:
        """Of the whole call."""
        return round(self.floor * rows * columns)


def bf16(rows: int, columns: int) -> Tensor:
    """Normal values on the GPU."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def norm_weight(columns: int) -> Tensor:
    """fp32, around 1."""
    return 1 + 0.1 * torch.randn(columns, device="cuda")


def _rms_norm(rows: int, columns: int) -> Call:
    x, weight = bf16(rows, columns), norm_weight(columns)
    return lambda: norm.rms_norm(x, weight)


def _rms_norm_residual(rows: int, columns: int) -> Call:
    x, residual, weight = bf16(rows, columns), bf16(rows, columns), norm_weight(columns)
    return lambda: norm.rms_norm_residual(x, residual, weight)


def _rms_norm_quantize(rows: int, columns: int) -> Call:
    x, weight = bf16(rows, columns), norm_weight(columns)
    return lambda: norm.rms_norm_quantize(x, weight)


def _rms_norm_residual_quantize(rows: int, columns: int) -> Call:
    x, residual, weight = bf16(rows, columns), bf16(rows, columns), norm_weight(columns)
    return lambda: norm.rms_norm_quantize(x, weight, residual=residual)


def _rms_norm_backward(rows: int, columns: int) -> Call:
    x, dy, weight = bf16(rows, columns), bf16(rows, columns), norm_weight(columns)
    rstd = torch.rand(rows, device="cuda") + 0.5
    return lambda: torch.ops.deepseek_ops.rms_norm_backward(dy, x, weight, rstd, None)


def _swiglu(rows: int, columns: int) -> Call:
    gate_up = bf16(rows, 2 * columns)
    return lambda: activation.swiglu(gate_up)


def _swiglu_quantize(rows: int, columns: int) -> Call:
    gate_up, weight = bf16(rows, 2 * columns), torch.rand(rows, device="cuda")
    return lambda: activation.swiglu_quantize(gate_up, weight)


def _swiglu_backward(rows: int, columns: int) -> Call:
    dy, gate_up, weight = bf16(rows, columns), bf16(rows, 2 * columns), torch.rand(rows, device="cuda")
    return lambda: activation.swiglu_backward(dy, gate_up, weight)


def _swiglu_backward_quantize(rows: int, columns: int) -> Call:
    dy, gate_up, weight = bf16(rows, columns), bf16(rows, 2 * columns), torch.rand(rows, device="cuda")
    return lambda: activation.swiglu_backward_quantize(dy, gate_up, weight)


def _swiglu_backward_quantize_cached(rows: int, columns: int) -> Call:
    dy, weight = bf16(rows, columns), torch.rand(rows, device="cuda")
    codes, scale = quantize_1x128(bf16(rows, 2 * columns), pow2=True)
    return lambda: activation.swiglu_backward_quantize(dy, codes, weight, gate_up_scale=scale)


HIDDEN, INNER = (512, 1536, 7168), (2048, 18432)
KERNELS = [
    Kernel("norm", "rms_norm", HIDDEN, 4, 0.88, _rms_norm),
    Kernel("norm", "rms_norm_residual", HIDDEN[2:], 8, 0.88, _rms_norm_residual),
    Kernel("norm", "rms_norm_quantize", HIDDEN, 2 + CODES, 0.88, _rms_norm_quantize),
    Kernel("norm", "rms_norm_residual_quantize", HIDDEN[2:], 6 + CODES, 0.88, _rms_norm_residual_quantize),
    Kernel("norm", "rms_norm_backward", HIDDEN, 6, 0.85, _rms_norm_backward),
    Kernel("activation", "swiglu", INNER, 6, 0.88, _swiglu),
    Kernel("activation", "swiglu_quantize", INNER, 4 + CODES, 0.88, _swiglu_quantize),
    Kernel("activation", "swiglu_backward", INNER, 10, 0.85, _swiglu_backward),
    Kernel("activation", "swiglu_backward_quantize", INNER, 6 + 5 * CODES, 0.85, _swiglu_backward_quantize),
    Kernel(
        "activation",
        "swiglu_backward_quantize (e4m3)",
        INNER,
        2 + 7 * CODES,
        0.80,
        _swiglu_backward_quantize_cached,
    ),
]


@dataclass(frozen=True)
class Result:
    """Times in microseconds: medians, and the 10th and 90th percentile of ours."""

    kernel: str
    rows: int
    columns: int
    floor_bytes: int
    ours_us: float
    ours_p10_us: float
    ours_p90_us: float
    copy_us: float
    eager_us: float
    target: float | None
    sm_clock_mhz: int | None
    power_w: float | None

    @property
    def of_copy(self) -> float:
        """Speed as a part of the copy's."""
        return self.copy_us / self.ours_us


def tensors(result: Any) -> list[Tensor]:
    """The outputs of a call."""
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def agrees(got: Any, want: Any) -> str:
    """ "" where outputs agree as two roundings of nearly the same values may: codes by one step in 1 % of the places."""
    for index, (a, b) in enumerate(zip(tensors(got), tensors(want), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index} has another shape or dtype"
        if a.dtype == E4M3:
            steps = (a.view(torch.int8).int() - b.view(torch.int8).int()).abs()
            if int(steps.max()) > 1 or float((steps > 0).float().mean()) > 0.01:
                return f"output {index} has other codes"
        else:
            unit = 2**-7 if a.dtype == torch.bfloat16 else 2**-13
            size = b.double().square().mean().sqrt()
            if float((a.double() - b.double()).abs().sub(unit * b.double().abs()).max()) > 1e-3 * float(size):
                return f"output {index} differs"
    return ""


def measure(kernel: Kernel, rows: int, columns: int, repeats: int, watch: Stopwatch) -> Result:
    """The op, the copy and eager in turns, so that a change of clock meets all of them."""
    ours = kernel.make(rows, columns)
    size = kernel.floor_bytes(rows, columns)
    baseline, copy = eager(ours), copy_of(size)
    problem = agrees(ours(), baseline())
    if problem:
        raise SystemExit(f"{kernel.name} {rows}x{columns}: {problem}; nothing was timed")
    times: dict[str, list[float]] = {"ours": [], "copy": [], "eager": []}
    for repeat in range(repeats + 3):
        for key, call in (("ours", ours), ("copy", copy), ("eager", baseline)):
            elapsed = watch.microseconds(call)
            if repeat >= 3:
                times[key].append(elapsed)
    clock, power = clocks()
    deciles = statistics.quantiles(times["ours"], n=10)
    return Result(
        kernel.name,
        rows,
        columns,
        size,
        statistics.median(times["ours"]),
        deciles[0],
        deciles[-1],
        statistics.median(times["copy"]),
        statistics.median(times["eager"]),
        kernel.target if size >= LARGE else None,
        clock,
        power,
    )


def line(r: Result) -> str:
    """One row of the table."""
    rate = r.floor_bytes / r.ours_us / 1000
    verdict = (
        "" if r.target is None else f"target {r.target:.2f} {'met' if r.of_copy >= r.target else 'missed'}"
    )
    return (
        f"{r.kernel:<32} {r.rows:>6}x{r.columns:<6} {r.ours_us:9.1f} us {rate:7.0f} GB/s  copy {r.copy_us:9.1f} us"
        f" ({r.of_copy:4.2f} of it)  eager {r.eager_us / r.ours_us:5.1f}x  {verdict}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    families = sorted({kernel.family for kernel in KERNELS})
    names = [kernel.name for kernel in KERNELS]
    parser = argparse.ArgumentParser(prog="python -m bench.memory_bound", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes of each kernel")
    parser.add_argument("--family", choices=families, action="append", help="only these (repeatable)")
    parser.add_argument("--kernel", choices=names, action="append", help="only these (repeatable)")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: must be at least 2; got {options.repeats}")
    chosen = [
        kernel
        for kernel in KERNELS
        if kernel.family in (options.family or families) and kernel.name in (options.kernel or names)
    ]
    tokens = TOKENS[1:3] if options.quick else TOKENS
    reason = absent_reason("cuda")
    if reason:
        print(f"bench.memory_bound measures CUDA kernels, and backend 'cuda' is absent here: {reason}")
        print("no GPU: floors only, nothing was measured")
        for kernel in chosen:
            print(
                f"{kernel.name:<32} {kernel.floor:6.2f} bytes an element, target {kernel.target:.2f} of a copy"
            )
        return
    torch.manual_seed(0)
    watch = Stopwatch()
    print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; ours / copy / eager, medians, cold L2"
    )
    results = []
    for kernel in chosen:
        for columns in kernel.columns[-1:] if options.quick else kernel.columns:
            for rows in tokens:
                try:
                    results.append(measure(kernel, rows, columns, options.repeats, watch))
                except torch.cuda.OutOfMemoryError:  # eager needs several copies in fp32
                    print(f"{kernel.name:<32} {rows}x{columns} skipped: does not fit into this GPU's memory")
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
