"""Kernels beside their baselines, in one process, on random data, with correctness asserted where time is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import deepseek_ops
from bench import moe as moe_bench
from deepseek_ops import gemm, quantize

from .claims import MOE_KERNELS, QUANTISERS, nominal_bandwidth
from .measure import compare
from .steps import GEMM_SHAPES, MOE_TOKENS, QUANTIZE_SHAPES

# Bytes moved per input element (research/gemm-quant.md section 7.2): bf16 in, fp8 and fp32 scales out.
FLOOR_BYTES = {
    "quantize_1x128": 2 + 1 + 4 / 128,
    "quantize_128x1": 2 + 1 + 4 / 128,
    "quantize_1x128_128x1": 2 + 2 * (1 + 4 / 128),
    "quantize_128x128": 2 + 1 + 4 / 16384,
}

# Ops on what a quantiser has made: name -> (bytes moved per element, the op on a bf16 x).
CODED: dict[str, tuple[float, Callable[[torch.Tensor], Callable[[], Any]]]] = {
    "pack_e5m6": (2 + 1.5 + 4 / 128, lambda x: lambda: quantize.pack_e5m6(x)),
    "pack_e5m6_row": (2 + 1.5, lambda x: lambda: quantize.pack_e5m6(x, granularity="row")),
    "unpack_e5m6": (
        1.5 + 4 / 128 + 2,
        lambda x: _on(quantize.unpack_e5m6, *quantize.pack_e5m6(x), x.shape[1]),
    ),
    "requantize_e5m6_128x1": (
        1.5 + 1 + 8 / 128,
        lambda x: _on(quantize.requantize_e5m6_128x1, *quantize.pack_e5m6(x), x.shape[1]),
    ),
    "dequantize_1x128": (
        1 + 4 / 128 + 2,
        lambda x: _on(quantize.dequantize_1x128, *quantize.quantize_1x128(x), dtype=torch.bfloat16),
    ),
    "dequantize_128x1": (
        1 + 4 / 128 + 2,
        lambda x: _on(
            quantize.dequantize_128x1, *quantize.quantize_128x1(x), x.shape[0], dtype=torch.bfloat16
        ),
    ),
    "dequantize_128x128": (
        1 + 4 / 16384 + 2,
        lambda x: _on(quantize.dequantize_128x128, *quantize.quantize_128x128(x), dtype=torch.bfloat16),
    ),
}


def _on(function: Callable[..., Any], *given: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*given, **options)


def bench_gemm(group: str) -> dict[str, Any]:
    """One group of shapes of fp8_gemm."""
    rows = [gemm_row(*shape) for shape in GEMM_SHAPES[group]]
    return {"rows": rows, "summary": _summary(rows, "cublaslt")}


def gemm_row(m: int, n: int, k: int) -> dict[str, Any]:
    """fp8_gemm and its baselines at one shape; a baseline that cannot run says why."""
    generator = torch.Generator("cuda").manual_seed(m * 7 + n * 3 + k)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    with deepseek_ops.backend("reference"):
        a, scale_a = quantize.quantize_1x128(x)
        b, scale_b = quantize.quantize_128x128(w)
    outputs: dict[str, torch.Tensor] = {}
    vendor = VendorOperands.of(a, scale_a, b, scale_b)
    candidates = {
        "ours": _ours(a, scale_a, b, scale_b, outputs),
        "cublaslt": lambda: _keep(outputs, "cublaslt", vendor.multiply(torch.bfloat16)),
        "deepgemm": _deepgemm(a, scale_a, b, scale_b, outputs),
        "cublas-bf16": lambda: torch.mm(x, w.T),
    }
    timed = compare(candidates)
    rows = slice(0, min(m, 128))
    exact = _dequantize_rows(a[rows], scale_a[:, rows], b, scale_b)
    for name, result in timed.items():
        if "median_us" not in result:
            continue
        for key, us in (
            ("tflops", result["median_us"]),
            ("sustained_tflops", result["sustained"]["mean_us"]),
        ):
            result[key] = round(2e-6 * m * n * k / us, 2)
        result["gbps"] = round(1e-3 * (m * k + n * k + 2 * m * n) / result["median_us"], 1)
        if name in outputs:
            error = _relative_rms(outputs[name][rows].double(), exact)
            result["rel_rms_bf16"] = error
            result["correct"] = error < 4e-3  # bf16 rounding alone is 1.1e-3 to 1.7e-3
    if "median_us" in timed["ours"]:
        with deepseek_ops.backend("cuda"):
            precise = gemm.fp8_gemm(a, scale_a, b, scale_b, out_dtype=torch.float32)
        timed["ours"]["rel_rms"] = _relative_rms(precise[rows].double(), exact)
        timed["ours"]["correct"] = timed["ours"]["correct"] and timed["ours"]["rel_rms"] <= 3e-4
    return {"kernel": "fp8_gemm", "shape": f"{m}x{n}x{k}", "candidates": timed}


def _keep(outputs: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    outputs[name] = value


def _ours(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    outputs: dict[str, torch.Tensor],
) -> Callable[[], None]:
    out = torch.empty(a.shape[0], b.shape[0], device="cuda", dtype=torch.bfloat16)
    outputs["ours"] = out

    def call() -> None:
        with deepseek_ops.backend("cuda"):
            gemm.fp8_gemm(a, scale_a, b, scale_b, out=out)

    return call


@dataclass(frozen=True)
class VendorOperands:
    """Our operands as cuBLASLt wants them: M a multiple of 4, block scales transposed with K padded to 4 blocks."""

    a: torch.Tensor
    scale_a: torch.Tensor  # [M, ceil(K/128)], M contiguous
    b: torch.Tensor
    scale_b: torch.Tensor  # [ceil(K/128) padded to 4, ceil(N/128)], K contiguous, padding 1
    rows: int

    @classmethod
    def of(
        cls, a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor
    ) -> VendorOperands:
        """Layout work that a user would do once, or not at all: it is not timed."""
        blocks, rows = scale_b.shape[1], a.shape[0]
        padded = torch.ones(scale_b.shape[0], -(-blocks // 4) * 4, device=b.device)
        padded[:, :blocks] = scale_b
        if rows % 4:
            more = torch.zeros(-rows % 4, a.shape[1], device=a.device, dtype=torch.uint8).view(a.dtype)
            a = torch.cat([a.view(torch.uint8), more.view(torch.uint8)]).view(a.dtype)
        return cls(a, scale_a.T, b, padded.T, rows)

    def multiply(self, dtype: torch.dtype) -> torch.Tensor:
        """cuBLASLt 1x128 by 128x128 (research: torch.nn.functional.scaled_mm, torch >= 2.10)."""
        recipe = torch.nn.functional.ScalingType
        out = torch.nn.functional.scaled_mm(
            self.a,
            self.b.T,
            self.scale_a,
            recipe.BlockWise1x128,
            self.scale_b,
            recipe.BlockWise128x128,
            output_dtype=dtype,
        )
        return out[: self.rows]


def _deepgemm(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    outputs: dict[str, torch.Tensor],
) -> Callable[[], None]:
    def call() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        out = outputs.setdefault(
            "deepgemm", torch.empty(a.shape[0], b.shape[0], device="cuda", dtype=torch.bfloat16)
        )
        # Our scale layout is its MN-major, TMA-aligned one: no transform is timed.
        deep_gemm.fp8_gemm_nt((a, scale_a.T[: a.shape[0]]), (b, scale_b), out)

    return call


def _dequantize_rows(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    k = a.shape[1]
    left = a.double() * scale_a.double().T.repeat_interleave(128, 1)[:, :k]
    right = (
        b.double() * scale_b.double().repeat_interleave(128, 0)[: b.shape[0]].repeat_interleave(128, 1)[:, :k]
    )
    return left @ right.T


def _relative_rms(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((got - exact).square().mean() / exact.square().mean()).sqrt())


def bench_quantize() -> dict[str, Any]:
    """The quantisers, bytes per second against the floor, beside a copy of the same input."""
    rows = []
    for tokens, hidden in QUANTIZE_SHAPES:
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        for kernel in QUANTISERS:
            rows.append(quantize_row(kernel, x))
        for kernel in CODED:
            rows.append(coded_row(kernel, x))
    name = torch.cuda.get_device_name()
    return {"rows": rows, "nominal_gbps": nominal_bandwidth(name), "summary": _summary(rows, "copy")}


def quantize_row(kernel: str, x: torch.Tensor) -> dict[str, Any]:
    """One quantiser on one input; bytes are compared with the reference on the first 256 rows' worth of tiles."""
    function = getattr(quantize, kernel)
    copy = torch.empty_like(x)

    def ours() -> Any:
        with deepseek_ops.backend("cuda"):
            return function(x)

    timed = compare({"ours": ours, "copy": lambda: copy.copy_(x)})
    for name, per_element in (("ours", FLOOR_BYTES[kernel]), ("copy", 4.0)):
        if "median_us" in timed[name]:
            timed[name]["gbps"] = round(1e-3 * per_element * x.numel() / timed[name]["median_us"], 1)
    if "median_us" in timed["ours"]:
        sample = x[:256].contiguous()
        with deepseek_ops.backend("cuda"):
            got = function(sample)
        with deepseek_ops.backend("reference"):
            want = function(sample)
        timed["ours"]["correct"] = all(same_bits(g, w) for g, w in zip(got, want, strict=True))
    shape = f"{x.shape[0]}x{x.shape[1]}"
    return {
        "kernel": kernel,
        "shape": shape,
        "input_bytes": x.numel() * x.element_size(),
        "candidates": timed,
    }


def bench_moe() -> dict[str, Any]:
    """The MoE plumbing at DeepSeek-V3's shape, bytes per second against the floor, beside a copy of as many bytes."""
    rows = []
    for tokens in MOE_TOKENS:
        rows += [moe_row(moe_bench.Case(kernel, tokens)) for kernel in MOE_KERNELS]
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    return {"rows": rows, "nominal_gbps": nominal_bandwidth(name), "summary": _summary(rows, "copy")}


def moe_row(case: moe_bench.Case) -> dict[str, Any]:
    """One op; compared with the reference where that fits beside it."""
    with deepseek_ops.backend("cuda"):
        call = moe_bench.call_of(case)

    def ours() -> Any:
        with deepseek_ops.backend("cuda"):
            return call()

    floor = moe_bench.floor_bytes(case)
    timed = compare({"ours": ours, "copy": moe_bench.copy_of(floor)})
    for result in timed.values():
        if "median_us" in result:
            result["gbps"] = round(1e-3 * floor / result["median_us"], 1)
    if "median_us" in timed["ours"] and case.tokens <= MOE_TOKENS[0]:
        with deepseek_ops.backend("reference"):
            want = call()
        timed["ours"]["correct"] = moe_bench.difference(ours(), want) == ""
    return {
        "kernel": case.op,
        "shape": f"{case.tokens}",
        "input_bytes": case.input_bytes,
        "candidates": timed,
    }


def coded_row(kernel: str, x: torch.Tensor) -> dict[str, Any]:
    """One op on codes; its result is compared with the reference's on the first 256 rows."""
    floor, prepare = CODED[kernel]
    with deepseek_ops.backend("cuda"):
        call, sample = prepare(x), prepare(x[:256].contiguous())
    copy = torch.empty_like(x)

    def on(backend: str, function: Callable[[], Any]) -> Any:
        with deepseek_ops.backend(backend):
            return function()

    timed = compare({"ours": lambda: on("cuda", call), "copy": lambda: copy.copy_(x)})
    for name, per_element in (("ours", floor), ("copy", 4.0)):
        if "median_us" in timed[name]:
            timed[name]["gbps"] = round(1e-3 * per_element * x.numel() / timed[name]["median_us"], 1)
    if "median_us" in timed["ours"]:
        got, want = (on(backend, sample) for backend in ("cuda", "reference"))
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        timed["ours"]["correct"] = all(same_bits(g, w) for g, w in pairs)
    return {
        "kernel": kernel,
        "shape": f"{x.shape[0]}x{x.shape[1]}",
        "input_bytes": x.numel() * x.element_size(),
        "candidates": timed,
    }


def bench_optimizer() -> dict[str, Any]:
    """adamw_ and clip_grad_norm on one layer's parameters, beside a copy and torch's fused AdamW."""
    from bench.optimizer import LISTS, rows_of

    rows = [row(name) for name in LISTS for row in rows_of(name)]
    name = torch.cuda.get_device_name()
    return {"rows": rows, "nominal_gbps": nominal_bandwidth(name), "summary": _summary(rows, "copy")}


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def ceilings() -> dict[str, Any]:
    """What this card gives without us: a large copy, and bf16 products on random data."""
    copy = _copy_row()
    products = [_product_row(size) for size in (4096, 8192)]
    gbps, tflops = copy["candidates"]["copy"]["gbps"], products[-1]["candidates"]["cublas-bf16"]["tflops"]
    return {
        "rows": [copy, *products],
        "nominal_gbps": nominal_bandwidth(torch.cuda.get_device_name()),
        "summary": f"copy {gbps:.0f} GB/s, bf16 {tflops:.0f} TFLOP/s",
    }


def _copy_row() -> dict[str, Any]:
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timed = compare({"copy": lambda: target.copy_(source)})
    timed["copy"]["gbps"] = round(1e-3 * 2 * source.numel() * 2 / timed["copy"]["median_us"], 1)
    return {"kernel": "copy", "shape": "1 GiB", "candidates": timed}


def _product_row(size: int) -> dict[str, Any]:
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed = compare({"cublas-bf16": lambda: torch.mm(x, y)})
    result = timed["cublas-bf16"]
    result["tflops"] = round(2e-6 * size**3 / result["median_us"], 2)
    result["sustained_tflops"] = round(2e-6 * size**3 / result["sustained"]["mean_us"], 2)
    return {"kernel": "bf16 product", "shape": f"{size}^3", "candidates": timed}


def _summary(rows: list[dict[str, Any]], baseline: str) -> str:
    parts = []
    for row in rows:
        ours, theirs = row["candidates"]["ours"], row["candidates"].get(baseline, {})
        if "median_us" not in ours:
            return f"ours absent: {ours.get('absent', '')}"
        ratio = f" {theirs['median_us'] / ours['median_us']:.2f}x" if "median_us" in theirs else ""
        rate = f"{ours['tflops']:.0f} TFLOP/s" if "tflops" in ours else f"{ours['gbps']:.0f} GB/s"
        parts.append(f"{row['kernel']} {row['shape']} {rate}{ratio}")
    return "; ".join(parts)


def vendor_partials() -> dict[str, Any]:
    """cuBLASLt on one 128-deep slice with unit scales against the tensor-core model, bit for bit."""
    from deepseek_ops.reference.tensor_core import tensor_core_accumulate

    cases = []
    for name, data in vendor_inputs():
        a, b = data
        ones = torch.ones(1, a.shape[0]).cuda(), torch.ones(-(-b.shape[0] // 128), 1).cuda()
        got = VendorOperands.of(a.cuda(), ones[0], b.cuda(), ones[1]).multiply(torch.float32).cpu()
        want = tensor_core_accumulate(a, b)
        differing = (got.view(torch.int32) != want.view(torch.int32)).nonzero().tolist()
        first = [
            {"index": at, "device": float(got[tuple(at)]), "emulator": float(want[tuple(at)])}
            for at in differing[:8]
        ]
        cases.append(
            {
                "name": name,
                "values": got.numel(),
                "equal": not differing,
                "differing": len(differing),
                "first": first,
            }
        )
    wrong = sum(not case["equal"] for case in cases)
    return {
        "cases": cases,
        "verdict": "differs" if wrong else "equal",
        "summary": f"{len(cases) - wrong} of {len(cases)} cases equal",
    }


def vendor_inputs() -> list[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Operands of one slice, [128, 128] each: normal, positive, wide exponents, subnormal."""
    generator = torch.Generator().manual_seed(5)
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "normal": lambda: torch.randn(128, 128, generator=generator),
        "positive": lambda: torch.rand(128, 128, generator=generator),
        "wide": lambda: (
            torch.randn(128, 128, generator=generator)
            * torch.exp2(torch.randint(-8, 8, (128, 128), generator=generator).float())
        ),
        "subnormal": lambda: torch.randn(128, 128, generator=generator) * 2**-8,
    }
    return [
        (name, (draw().to(torch.float8_e4m3fn), draw().to(torch.float8_e4m3fn)))
        for name, draw in kinds.items()
    ]
