"""Every claim that only silicon can confirm, in one place. docs/hardware.md shows which of them stand.

A claim names one step and reads its data: True confirms, False refutes, None says nothing (the step ran without the
kernel, say). A claim without a successful step is unproven. To add one, append to CLAIMS and, if nothing measures it
yet, a step in steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .steps import GEMM_SHAPES, PROBES

Verdict = tuple[bool | None, str]  # and the evidence in a few words
Data = dict[str, Any]

NOMINAL_GBPS = {"H100 PCIe": 2039, "H100 NVL": 3938, "H100": 3352, "H200": 4800, "H800": 3352, "GH200": 4023}


@dataclass(frozen=True)
class Claim:
    """text: what is claimed; step: where the evidence is; judge: the step's data -> verdict."""

    name: str
    subject: str  # a kernel, or a part of the emulator
    text: str
    step: str
    judge: Callable[[Data], Verdict]


def nominal_bandwidth(device: str) -> int | None:
    """HBM bandwidth of the data sheet, GB/s; the most specific name wins."""
    for name in sorted(NOMINAL_GBPS, key=len, reverse=True):
        if all(word in device for word in name.split()):
            return NOMINAL_GBPS[name]
    return None


def probe_agrees(data: Data) -> Verdict:
    """A probe: device and emulator bit for bit."""
    cases = data.get("cases", [])
    if not cases:
        return None, "no cases"
    wrong = [case["name"] for case in cases if not case["equal"]]
    if wrong:
        return False, f"{len(wrong)} of {len(cases)} cases differ, first {wrong[0]}"
    return True, f"{len(cases)} cases, {sum(case['values'] for case in cases)} values"


def tests_pass(word: str) -> Callable[[Data], Verdict]:
    """Every GPU test whose name contains `word` passes, and there is one."""

    def judge(data: Data) -> Verdict:
        outcomes = {name: state for name, state in data.get("outcomes", {}).items() if word in name}
        failed = sorted(name for name, state in outcomes.items() if state == "failed")
        passed = sum(state == "passed" for state in outcomes.values())
        if failed:
            return False, f"{len(failed)} failed, first {failed[0]}"
        return (True, f"{passed} tests") if passed else (None, "no such test ran")

    return judge


def _rows(data: Data) -> list[Data]:
    rows: list[Data] = data.get("rows", [])
    return rows


def faster_than(baseline: str, ratio: float, among: str = "") -> Callable[[Data], Verdict]:
    """Ours at least `ratio` times as fast as the baseline on every shape, and correct there (cold L2, medians).

    among: only shapes that have this candidate.
    """

    def judge(data: Data) -> Verdict:
        worst: tuple[float, str] | None = None
        for row in _rows(data):
            if among and among not in row["candidates"]:
                continue
            ours, theirs = row["candidates"].get("ours", {}), row["candidates"].get(baseline, {})
            if ours.get("correct") is False:
                return False, f"{row['shape']}: ours is wrong"
            if "median_us" not in ours or "median_us" not in theirs or theirs.get("correct") is False:
                return None, f"{row['shape']}: {ours.get('absent') or theirs.get('absent') or 'not measured'}"
            value = theirs["median_us"] / ours["median_us"]
            worst = min(worst or (value, row["shape"]), (value, row["shape"]))
        if worst is None:
            return None, "no shapes"
        return worst[0] >= ratio, f"at least {worst[0]:.3f}x ({worst[1]})"

    return judge


def bandwidth_at_least(kernel: str, share: float, megabytes: int = 64) -> Callable[[Data], Verdict]:
    """Share of the data sheet's bandwidth on every input of at least that many MB."""

    def judge(data: Data) -> Verdict:
        nominal = data.get("nominal_gbps")
        rows = [r for r in _rows(data) if r["kernel"] == kernel and r["input_bytes"] >= megabytes << 20]
        if not nominal or not rows:
            return None, "no such row" if nominal else "nominal bandwidth unknown"
        worst: tuple[float, str] | None = None
        for row in rows:
            ours = row["candidates"].get("ours", {})
            if ours.get("correct") is False:
                return False, f"{row['shape']}: ours is wrong"
            if "gbps" not in ours:
                return None, f"{row['shape']}: {ours.get('absent', 'not measured')}"
            worst = min(worst or (ours["gbps"], row["shape"]), (ours["gbps"], row["shape"]))
        assert worst is not None
        return worst[
            0
        ] >= share * nominal, f"at least {worst[0] / nominal:.1%} of {nominal} GB/s ({worst[1]})"

    return judge


def _accurate(data: Data) -> Verdict:
    values = [r["candidates"]["ours"].get("rel_rms") for r in _rows(data) if "ours" in r["candidates"]]
    known = [v for v in values if v is not None]
    if not known:
        return None, "not measured"
    return max(known) <= 3e-4, f"relRMS at most {max(known):.2e}"


QUANTISERS = ("quantize_1x128", "quantize_128x1", "quantize_1x128_128x1", "quantize_128x128")

# Share of HBM bandwidth that is claimed on inputs of 64 MB and more.
MOE_KERNELS = {
    "route": 0.6,
    "route_backward": 0.7,
    "balance_loss": 0.5,
    "permute": 0.8,
    "permute_quantized": 0.8,
    "unpermute": 0.8,
    "unpermute_backward": 0.8,
}


# Ops on codes, with the share of bandwidth that research/gemm-quant.md section 7.2 asks of them.
CODED_SHARES = {
    "pack_e5m6": 0.88,
    "pack_e5m6_row": 0.88,
    "unpack_e5m6": 0.88,
    "requantize_e5m6_128x1": 0.80,
    "dequantize_1x128": 0.88,
    "dequantize_128x1": 0.80,
    "dequantize_128x128": 0.88,
}


def _all() -> list[Claim]:
    claims = [
        Claim(
            f"emulator.{name}",
            "emulator",
            f"Equals silicon bit for bit: {what}",
            f"probe-{name}",
            probe_agrees,
        )
        for name, (_, _, what, _) in PROBES.items()
    ]
    claims.append(
        Claim(
            "tensor_core.vendor", "tensor-core model",
            "Equals cuBLASLt's 128-deep fp32 partial sums bit for bit (reference/tensor_core.py)",
            "vendor-partials", probe_agrees,
        )
    )  # fmt: skip
    for kernel in QUANTISERS:
        claims += [
            Claim(
                f"{kernel}.bytes", kernel, "Bytes and scales equal the reference on every special value",
                "tests", tests_pass(f"test_quantiser_bytes[{kernel}-"),
            ),
            Claim(
                f"{kernel}.speed", kernel, "At least 88 % of HBM bandwidth on inputs of 64 MB and more",
                "bench-quantize", bandwidth_at_least(kernel, 0.88),
            ),
        ]  # fmt: skip
    for kernel, share in MOE_KERNELS.items():
        what = (
            "Equals the reference to the byte"
            if kernel.startswith("permute")
            else "Equals the model up to rounding"
        )
        claims += [
            Claim(f"{kernel}.results", kernel, what, "tests", tests_pass(f"test_moe_results[{kernel}-")),
            Claim(f"{kernel}.repeat", kernel, "Twenty repeats are bitwise equal", "tests",
                  tests_pass(f"test_moe_repeat[{kernel}]")),
            Claim(
                f"{kernel}.speed", kernel, f"At least {share:.0%} of HBM bandwidth on inputs of 64 MB and more",
                "bench-moe", bandwidth_at_least(kernel, share),
            ),
        ]  # fmt: skip
    claims.append(
        Claim("permute.graph", "permute", "A MoE layer's plumbing is captured in a CUDA graph and replays", "tests",
              tests_pass("test_moe_graph"))
    )  # fmt: skip
    for kernel, share in CODED_SHARES.items():
        claims += [
            Claim(
                f"{kernel}.bytes", kernel, "Bits equal the reference, special values included", "tests",
                tests_pass(f"test_coded_bytes[{kernel}-"),
            ),
            Claim(
                f"{kernel}.speed", kernel, f"At least {share:.0%} of HBM bandwidth on inputs of 64 MB and more",
                "bench-quantize", bandwidth_at_least(kernel, share),
            ),
        ]  # fmt: skip
    claims += [
        Claim("adamw_.bits", "adamw_", "Equals the reference bit for bit", "tests", tests_pass("test_adamw_bits")),
        Claim(
            "adamw_.graph", "adamw_", "Clip and step are captured in a CUDA graph: no host synchronisation", "tests",
            tests_pass("test_adamw_graph"),
        ),
        Claim(
            "adamw_.speed", "adamw_", "At least 90 % of HBM bandwidth on a layer's parameters", "bench-optimizer",
            bandwidth_at_least("adamw_", 0.90),
        ),
        Claim("adamw_quantize_.bits", "adamw_quantize_", "Equals adamw_, quantize_128x128 and transpose_128x128 bit for bit",
              "tests", tests_pass("test_adamw_with_copies_bits")),
        Claim("adamw_quantize_.speed", "adamw_quantize_", "At least 85 % of HBM bandwidth on a layer's parameters",
              "bench-optimizer", bandwidth_at_least("adamw_quantize_", 0.85)),
        Claim(
            "clip_grad_norm.bits", "clip_grad_norm", "Equals the reference's fp64 norm, rounded once", "tests",
            tests_pass("test_clip_bits"),
        ),
        Claim(
            "clip_grad_norm.speed", "clip_grad_norm", "At least 90 % of HBM bandwidth on a layer's gradients",
            "bench-optimizer", bandwidth_at_least("clip_grad_norm", 0.90),
        ),
    ]  # fmt: skip
    kernel = "fp8_gemm"
    claims += [
        Claim(
            "fp8_gemm.bits", kernel, "Equals the `hopper` reference bit for bit", "tests", tests_pass("fp8_gemm_bits")
        ),
        Claim("fp8_gemm.repeat", kernel, "Twenty repeats are bitwise equal", "tests", tests_pass("fp8_gemm_repeat")),
        Claim(
            "fp8_gemm.graph", kernel, "A launch is captured in a CUDA graph and replays", "tests",
            tests_pass("fp8_gemm_graph"),
        ),
        Claim(
            "fp8_gemm.accuracy", kernel, "fp32 output within relRMS 3e-4 of fp64 at K up to 16384",
            "bench-fp8_gemm-large", _accurate,
        ),
    ]  # fmt: skip
    floors = {
        "large": ("K >= 7168, M >= 4096", 1.0),
        "short-k": ("K 512 to 2048", 1.0),
        "decode": ("M <= 128", 1.3),
    }
    for group in GEMM_SHAPES:
        text, ratio = floors[group]
        claims.append(
            Claim(
                f"fp8_gemm.speed.{group}", kernel, f"At least {ratio:.2f}x cuBLASLt blockwise at {text}",
                f"bench-fp8_gemm-{group}", faster_than("cublaslt", ratio),
            )
        )  # fmt: skip
    claims.append(
        Claim(
            "fp8_gemm.deepgemm", kernel, "At least 1.00x DeepGEMM at K >= 7168, M >= 4096", "bench-fp8_gemm-large",
            faster_than("deepgemm", 1.0),
        )
    )  # fmt: skip
    return claims + _decoding() + _weight_gradients()


def _decoding() -> list[Claim]:
    claims = []
    for kernel, step in (
        ("fp8_gemm_decode", "bench-fp8_decode"),
        ("fp8_gemm_masked_decode", "bench-fp8_masked_decode"),
    ):
        claims += [
            Claim(f"{kernel}.bits", kernel, "Equals its model bit for bit", "tests", tests_pass(f"test_{kernel}_bits")),
            Claim(
                f"{kernel}.graph", kernel, "A launch is captured in a CUDA graph, replays on new data, and repeats",
                "tests", tests_pass(f"test_{kernel}_graph"),
            ),
            Claim(
                f"{kernel}.bandwidth", kernel, "At least 75 % of HBM bandwidth on weights of 64 MB and more", step,
                bandwidth_at_least(kernel, 0.75),
            ),
            Claim(
                f"{kernel}.speed", kernel, "At least 1.30x cuBLASLt blockwise", step, faster_than("cublaslt", 1.3)
            ),
        ]  # fmt: skip
    kernel = "fp8_gemm_decode"
    claims.append(
        Claim(
            f"{kernel}.batch", kernel, "A row has the same bits in every batch", "tests", tests_pass(f"test_{kernel}_batch")
        )
    )  # fmt: skip
    return claims


def _weight_gradients() -> list[Claim]:
    claims = []
    for kernel in ("fp8_wgrad", "fp8_wgrad_grouped"):
        claims += [
            Claim(
                f"{kernel}.bits", kernel, "Equals the `hopper` reference bit for bit", "tests",
                tests_pass(f"test_{kernel}_bits["),
            ),
            Claim(f"{kernel}.repeat", kernel, "Twenty repeats are bitwise equal", "tests", tests_pass(f"test_{kernel}_repeat")),
            Claim(
                f"{kernel}.accuracy", kernel, "fp32 output within relRMS 3e-4 of fp64", f"bench-{kernel}", _accurate
            ),
            Claim(
                f"{kernel}.deepgemm", kernel, "At least 1.15x DeepGEMM's own 1D1D kernel, accumulating in fp32",
                f"bench-{kernel}", faster_than("deepgemm", 1.15),
            ),
        ]  # fmt: skip
    claims += [
        Claim(
            "fp8_wgrad.speed", "fp8_wgrad", "At least 1.00x cuBLASLt blockwise with the addition that it needs",
            "bench-fp8_wgrad", faster_than("cublaslt", 1.0),
        ),
        Claim(
            "fp8_wgrad_grouped.graph", "fp8_wgrad_grouped", "A captured launch replays with other offsets", "tests",
            tests_pass("test_fp8_wgrad_grouped_graph"),
        ),
    ]  # fmt: skip
    kernel = "bf16_gemm"
    for name, text in (
        ("bits", "Equals the tensor-core model bit for bit, in any major and grouping"),
        ("repeat", "Twenty repeats are bitwise equal"),
        ("graph", "A launch is captured in a CUDA graph and replays with other offsets"),
    ):
        claims.append(Claim(f"bf16_gemm.{name}", kernel, text, "tests", tests_pass(f"bf16_gemm_{name}")))
    for baseline, what in (("cublas", "dense products"), ("torch", "grouped products")):
        claims.append(
            Claim(
                f"bf16_gemm.speed.{baseline}", kernel, f"At least 0.97x PyTorch's {what}", "bench-bf16_gemm",
                faster_than(baseline, 0.97, baseline),
            )
        )  # fmt: skip
    kernel = "linear_cross_entropy"
    for name, text in (
        ("values", "Loss and gradients equal the model up to the device's exp, ln and 1/x"),
        ("repeat", "Twenty repeats are bitwise equal"),
        ("graph", "A launch is captured in a CUDA graph and replays on new data"),
    ):
        claims.append(
            Claim(f"loss.{name}", kernel, text, "tests", tests_pass(f"linear_cross_entropy_{name}"))
        )
    claims.append(
        Claim(
            "loss.speed", kernel, "Forward and gradients at least as fast as PyTorch's unfused formula", "bench-loss",
            faster_than("eager", 1.0, "eager"),
        )
    )  # fmt: skip
    for kernel, word in (
        ("fp8_gemm_grouped", "1.00x DeepGEMM on the rows that it takes"),
        ("fp8_gemm_masked", "1.00x DeepGEMM"),
    ):
        claims += [
            Claim(
                f"{kernel}.bits", kernel, "Equals the `hopper` reference bit for bit, in every tile", "tests",
                tests_pass(f"test_{kernel}_bits["),
            ),
            Claim(
                f"{kernel}.cublaslt", kernel, "At least 1.00x a loop of cuBLASLt blockwise that knows the sizes",
                f"bench-{kernel}", faster_than("cublaslt", 1.0),
            ),
            Claim(f"{kernel}.deepgemm", kernel, f"At least {word}", f"bench-{kernel}", faster_than("deepgemm", 1.0)),
        ]  # fmt: skip
    kernel = "fp8_gemm_grouped"
    claims += [
        Claim(
            f"{kernel}.ragged", kernel, "At least 1.00x a loop of cuBLASLt blockwise on Zipf-sized groups",
            "bench-fp8_gemm_ragged", faster_than("cublaslt", 1.0),
        ),
        Claim(f"{kernel}.repeat", kernel, "Twenty repeats are bitwise equal", "tests", tests_pass(f"{kernel}_repeat")),
        Claim(
            f"{kernel}.graph", kernel, "A captured chain of launches replays with other offsets", "tests",
            tests_pass(f"{kernel}_graph"),
        ),
        Claim(
            f"{kernel}.nonsense", kernel, "Offsets that descend or are out of range write nothing outside of D", "tests",
            tests_pass(f"{kernel}_nonsense"),
        ),
    ]  # fmt: skip
    return claims


CLAIMS: list[Claim] = _all()
