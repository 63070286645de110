"""What this repository measured itself (bench/ledger), in the place of what others published.

A benchmark's row of a kernel of ours becomes the share of the peak that it reached; where several shapes were run, the median of
those with work enough to fill a GPU. Only runs on the same card count, newest first. There is no ledger yet, so nothing changes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.proof.ledger import read_all
from examples.plan.hardware import TERA, Efficiencies, Hardware, Value

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "ledger"
LARGE = 0.1 * TERA  # FLOPs of a product that fills a GPU: 4096 x 7168 x 2048 has 0.12

# Kernels of the ledger, the assumption that they replace, and whether their peak is that of FP8.
_KERNELS = {
    "fp8_gemm": ("fp8_dense", True),
    "fp8_gemm_grouped": ("fp8_grouped", True),
    "fp8_wgrad_grouped": ("fp8_wgrad", True),
    "bf16_gemm": ("bf16_gemm", False),
}


def measured(hardware: Hardware, assumptions: Efficiencies, folder: Path = FOLDER) -> Efficiencies:
    """The assumptions, with measured shares of the peaks of this card wherever the ledger has them."""
    ledgers, _ = read_all(folder)
    found: dict[str, Value] = {}
    for name, ledger in reversed(ledgers):
        if hardware.name.split()[0] not in ledger["device"]["name"].split():
            continue
        rows = [row for step in ledger["steps"] for row in _rows(step)]
        for kernel, (field, fp8) in _KERNELS.items():
            peak = (hardware.fp8 if fp8 else hardware.bf16).number
            rates = [TERA * r["tflops"] / peak for r in rows if r["kernel"] == kernel and _large(r)]
            if rates and field not in found:
                source = f"bench/ledger/{name}: median of {len(rates)} shapes of {kernel}, alone on the card"
                found[field] = Value(statistics.median(rates), "measured", source)
    return replace(assumptions, **found)


def _rows(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["kind"] != "benchmark" or step["status"] != "ok":
        return
    for row in step["data"].get("rows", ()):
        ours = row.get("candidates", {}).get("ours", {})
        if ours.get("correct") and "tflops" in ours and "median_us" in ours:
            yield {"kernel": row["kernel"], "tflops": ours["tflops"], "median_us": ours["median_us"]}


def _large(row: dict[str, Any]) -> bool:
    return bool(row["tflops"] * TERA * row["median_us"] * 1e-6 >= LARGE)
