"""What a claim is that only silicon can confirm, and how a step's data is judged. docs/hardware.md shows which stand.

A claim names one step and reads its data: True confirms, False refutes, None says nothing (the step ran without the
kernel, say). A claim without a successful step is unproven. The claims that there are stand in bench/proof/families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .steps import Data

Verdict = tuple[bool | None, str]  # and the evidence in a few words

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


def faster_than(baseline: str, ratio: float, among: str = "", kernel: str = "") -> Callable[[Data], Verdict]:
    """Ours at least `ratio` times as fast as the baseline on every shape, and correct there (cold L2, medians).

    among: only shapes that have this candidate. kernel: only rows of this kernel.
    """

    def judge(data: Data) -> Verdict:
        worst: tuple[float, str] | None = None
        for row in _rows(data):
            if (among and among not in row["candidates"]) or (kernel and row["kernel"] != kernel):
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
        evidence = f"at least {worst[0] / nominal:.1%} of {nominal} GB/s ({worst[1]})"
        return worst[0] >= share * nominal, evidence

    return judge


def accurate(limit: float) -> Callable[[Data], Verdict]:
    """Relative RMS error of ours against fp64, on every shape that has one."""

    def judge(data: Data) -> Verdict:
        values = [r["candidates"]["ours"].get("rel_rms") for r in _rows(data) if "ours" in r["candidates"]]
        known = [v for v in values if v is not None]
        if not known:
            return None, "not measured"
        return max(known) <= limit, f"relRMS at most {max(known):.2e}"

    return judge


def tested(name: str, subject: str, text: str, tests: str) -> Claim:
    """The claim `name` about `subject`, which the GPU tests with `tests` in their names confirm."""
    return Claim(name, subject, text, "tests", tests_pass(tests))


def steady(kernel: str, repeat: str, graph: str) -> list[Claim]:
    """What holds of every kernel: one answer, without the host. The arguments are words of the tests' names."""
    return [
        tested(f"{kernel}.repeat", kernel, "Twenty repeats are bitwise equal", repeat),
        tested(
            f"{kernel}.graph", kernel, "A launch is captured in a CUDA graph and replays on other data", graph
        ),
    ]


def fast(kernel: str, step: str, share: float, what: str = "inputs") -> Claim:
    """At least that share of the data sheet's bandwidth where there are 64 MB to move."""
    text = f"At least {100 * share:.0f} % of HBM bandwidth on {what} of 64 MB and more"
    return Claim(f"{kernel}.speed", kernel, text, step, bandwidth_at_least(kernel, share))
