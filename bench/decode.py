"""FP8 decoding products on a Hopper GPU: microseconds, and bytes of the weights a second against what memory allows.

    python -m bench.decode [--quick] [--repeats 30] [--json FILE]

For each shape of DeepSeek-V3, in one process and in turns, on random data with a cold L2:

- ours         `fp8_gemm_decode` (split_k as chosen), or `fp8_gemm_masked_decode` for a batch of experts, into `out`
- prefetched   the same with `prefetch_weights=True`: what overlapping the kernel before can give
- fp8_gemm     our kernel for any number of rows
- cublaslt     cuBLASLt blockwise; for a batch a loop over experts whose sizes the host knows, which a server does not
- deepgemm     DeepGEMM, where it is installed
- cublas-bf16  torch.mm on bf16 operands: twice the bytes

The floor is the weights read once (and the little else) at the data sheet's bandwidth. The result is compared with fp64
before any number is shown. Without a Hopper GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deepseek_ops
from deepseek_ops import gemm, quantize
from deepseek_ops._gemm_checks import choose_split_k
from deepseek_ops._registry import absent_reason

from .proof.benchmarks import VendorOperands, _deepgemm, _dequantize_rows, _relative_rms
from .proof.claims import nominal_bandwidth
from .proof.measure import compare
from .proof.steps import DECODE_SHAPES, MASKED_DECODE_SHAPES


def floor_bytes(rows: int, n: int, k: int, groups: int = 1) -> int:
    """What any version must read and write: weights with their scales, `rows` of each group in, and of bf16 out."""
    blocks, columns = -(-n // 128), -(-k // 128)
    return groups * (n * k + 4 * blocks * columns + rows * k + 4 * rows * columns + 2 * rows * n)


def _weights(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    with deepseek_ops.backend("reference"):
        return (w, *quantize.quantize_128x128(w))


def _rows(m: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    with deepseek_ops.backend("reference"):
        return (x, *quantize.quantize_1x128(x))


def _on_cuda(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with deepseek_ops.backend("cuda"):
            call()

    return run


def decode_row(m: int, n: int, k: int, repeats: int = 30, sustained_s: float = 0.7) -> dict[str, Any]:
    """One product and its baselines; a baseline that cannot run says why."""
    x, a, scale_a = _rows(m, k, m)
    w, b, scale_b = _weights(n, k, n + k)
    outputs: dict[str, torch.Tensor] = {
        name: torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        for name in ("ours", "prefetched", "fp8_gemm")
    }
    vendor = VendorOperands.of(a, scale_a, b, scale_b)

    def cublaslt() -> None:
        outputs["cublaslt"] = vendor.multiply(torch.bfloat16)

    timed = compare(
        {
            "ours": _on_cuda(lambda: gemm.fp8_gemm_decode(a, scale_a, b, scale_b, out=outputs["ours"])),
            "prefetched": _on_cuda(
                lambda: gemm.fp8_gemm_decode(
                    a, scale_a, b, scale_b, out=outputs["prefetched"], prefetch_weights=True
                )
            ),
            "fp8_gemm": _on_cuda(lambda: gemm.fp8_gemm(a, scale_a, b, scale_b, out=outputs["fp8_gemm"])),
            "cublaslt": cublaslt,
            "deepgemm": _deepgemm(a, scale_a, b, scale_b, outputs),
            "cublas-bf16": lambda: torch.mm(x, w.T),
        },
        repeats,
        sustained_s,
    )
    exact = _dequantize_rows(a, scale_a, b, scale_b)
    with_rates(timed, floor_bytes(m, n, k), {name: (out.double(), exact) for name, out in outputs.items()})
    timed["cublas-bf16"].pop("gbps", None)  # it reads other bytes
    if "median_us" in timed["ours"]:
        with deepseek_ops.backend("cuda"):
            precise = gemm.fp8_gemm_decode(a, scale_a, b, scale_b, out_dtype=torch.float32)
        timed["ours"]["rel_rms"] = _relative_rms(precise.double(), exact)
        timed["ours"]["correct"] = timed["ours"]["correct"] and timed["ours"]["rel_rms"] <= 3e-4
    return {
        "kernel": "fp8_gemm_decode",
        "shape": f"{m}x{n}x{k}",
        "split_k": choose_split_k(n, k),
        "input_bytes": n * k,
        "floor_bytes": floor_bytes(m, n, k),
        "candidates": timed,
    }


def masked_row(
    groups: int, rows: int, room: int, n: int, k: int, repeats: int = 30, sustained_s: float = 0.7
) -> dict[str, Any]:
    """A batch of experts with `rows` rows each."""
    pieces = [_rows(room, k, g) for g in range(groups)]
    a, scale_a = (torch.stack([p[i].view(torch.uint8) if i == 1 else p[i] for p in pieces]) for i in (1, 2))
    a = a.view(torch.float8_e4m3fn)
    experts = [_weights(n, k, g)[1:] for g in range(groups)]
    b = torch.stack([e[0].view(torch.uint8) for e in experts]).view(torch.float8_e4m3fn)
    scale_b = torch.stack([e[1] for e in experts])
    masked_m = torch.full((groups,), rows, device="cuda", dtype=torch.int32)
    out = torch.empty(groups, room, n, device="cuda", dtype=torch.bfloat16)
    theirs = torch.empty_like(out)
    vendors = [
        VendorOperands.of(a[g, :rows], scale_a[g, :, : -(-rows // 4) * 4].contiguous(), b[g], scale_b[g])
        for g in range(groups)
    ]

    def deepgemm() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        scales = scale_a.mT[:, :room]
        deep_gemm.m_grouped_fp8_gemm_nt_masked((a, scales), (b, scale_b), theirs, masked_m, rows)

    timed = compare(
        {
            "ours": _on_cuda(lambda: gemm.fp8_gemm_masked_decode(a, scale_a, b, scale_b, masked_m, out=out)),
            "cublaslt": lambda: [vendor.multiply(torch.bfloat16) for vendor in vendors],
            "deepgemm": deepgemm,
        },
        repeats,
        sustained_s,
    )
    last = groups - 1
    exact = _dequantize_rows(a[last, :rows], scale_a[last, :, :rows], b[last], scale_b[last])
    compared = {"ours": (out[last, :rows].double(), exact)}
    if "median_us" in timed["deepgemm"]:
        compared["deepgemm"] = (theirs[last, :rows].double(), exact)
    with_rates(timed, floor_bytes(rows, n, k, groups), compared)
    return {
        "kernel": "fp8_gemm_masked_decode",
        "shape": f"{groups}x{rows}/{room}x{n}x{k}",
        "input_bytes": groups * n * k,
        "floor_bytes": floor_bytes(rows, n, k, groups),
        "candidates": timed,
    }


def with_rates(
    timed: dict[str, dict[str, Any]], size: int, results: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Adds GB/s of the floor's bytes to each candidate, and whether its bf16 result is right."""
    for name, result in timed.items():
        if "median_us" not in result:
            continue
        result["gbps"] = round(1e-3 * size / result["median_us"], 1)
        if name in results:
            error = _relative_rms(*results[name])
            result["rel_rms_bf16"] = error
            result["correct"] = error < 4e-3  # bf16 rounding alone is 1.1e-3 to 1.7e-3


def prove_decode() -> dict[str, Any]:
    """The step `bench-fp8_decode` of bench/prove.py."""
    return _step([decode_row(*shape) for shape in DECODE_SHAPES])


def prove_masked() -> dict[str, Any]:
    """The step `bench-fp8_masked_decode`."""
    return _step([masked_row(*shape) for shape in MASKED_DECODE_SHAPES])


def _step(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": rows,
        "nominal_gbps": nominal_bandwidth(torch.cuda.get_device_name()),
        "summary": "; ".join(line(row) for row in rows),
    }


def line(row: dict[str, Any]) -> str:
    """One shape in a line."""
    parts = [f"{row['kernel']} {row['shape']}"]
    for name, result in row["candidates"].items():
        if "median_us" not in result:
            parts.append(f"{name} absent")
            continue
        rate = f" {result['gbps']:.0f} GB/s" if "gbps" in result else ""
        wrong = " WRONG" if result.get("correct") is False else ""
        parts.append(f"{name} {result['median_us']:.1f} us{rate}{wrong}")
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes of each kind")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: must be at least 2; got {options.repeats}")
    reason = absent_reason("cuda")
    if reason:
        print(
            f"bench.decode measures CUDA kernels, and backend 'cuda' is absent here (no GPU result): {reason}"
        )
        return
    name = torch.cuda.get_device_name(0)
    print(f"{name}, data sheet {nominal_bandwidth(name)} GB/s, torch {torch.__version__}; medians, cold L2")
    last = 2 if options.quick else None
    rows = []
    for function, shapes in ((decode_row, DECODE_SHAPES), (masked_row, MASKED_DECODE_SHAPES)):
        for shape in shapes[:last]:
            rows.append(function(*shape, repeats=options.repeats, sustained_s=0.0))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
