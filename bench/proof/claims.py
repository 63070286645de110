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


def faster_than(baseline: str, ratio: float) -> Callable[[Data], Verdict]:
    """Ours at least `ratio` times as fast as the baseline on every shape, and correct there (cold L2, medians)."""

    def judge(data: Data) -> Verdict:
        worst: tuple[float, str] | None = None
        for row in _rows(data):
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


# Kernel of bench.memory_bound: its step, and the share of the data sheet's bandwidth that it claims.
MEMORY_BOUND_CLAIMS = {
    "rms_norm": ("norm", 0.88),
    "rms_norm_residual": ("norm", 0.88),
    "rms_norm_quantize": ("norm", 0.88),
    "rms_norm_residual_quantize": ("norm", 0.88),
    "rms_norm_backward": ("norm", 0.85),
    "swiglu": ("activation", 0.88),
    "swiglu_quantize": ("activation", 0.88),
    "swiglu_backward": ("activation", 0.85),
    "swiglu_backward_quantize": ("activation", 0.85),
}
QUANTISERS = ("quantize_1x128", "quantize_128x1", "quantize_1x128_128x1", "quantize_128x128")


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
    for kernel, (family, share) in MEMORY_BOUND_CLAIMS.items():
        claims += [
            Claim(
                f"{kernel}.values", kernel, "Differs from the modelled bits by what approximate instructions allow",
                "tests", tests_pass(f"test_memory_bound_values[{kernel}-"),
            ),
            Claim(
                f"{kernel}.speed", kernel, f"At least {share:.0%} of HBM bandwidth on 64 MB and more",
                f"bench-memory-bound-{family}", bandwidth_at_least(kernel, share),
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
    return claims


CLAIMS: list[Claim] = _all()
