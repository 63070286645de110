"""How much FP8 training costs: pairs of runs that differ in precision alone, over several seeds (report section 3.3).

    python -m bench.fp8_gap [--seeds 5] [--quick] [--run-dir runs/fp8_gap] [--threads N] [section.key=value ...]

One pair of small runs says little: two runs part ways after some dozen steps, and their smoothed losses then differ by a
few tenths of a percent in either direction, whatever the cause. The mean over seeds is the figure; its standard error says
how far to trust it. Each pair is a run folder of `examples.run` and resumes like one; finished pairs are kept.

The gap of a pair: relative difference of the two loss curves after smoothing with 0.9 (as the report's figure 10), mean of the last
tenth of the steps; beside it that of the held-out losses. Writes gaps.json beside the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from examples.report.plots import BAND, gap_percent
from examples.stages.stage import read_done
from examples.train.metrics import read_metrics

STAGES = "tokenize,pretrain,fp8"


def measure(folder: Path) -> dict[str, float]:
    """The gap of one finished pair, in percent: of the smoothed curves and of the held-out losses."""
    runs = [read_metrics(folder / stage / "metrics.jsonl") for stage in ("pretrain", "fp8")]
    losses = [{r["step"]: r["loss"] for r in run if "loss" in r} for run in runs]
    steps = sorted(losses[0].keys() & losses[1].keys())
    if not steps:
        raise ValueError(f"{folder}: the two runs share no step")
    gap = gap_percent(*([of[step] for step in steps] for of in losses))
    tail = gap[-max(1, len(gap) // 10) :]
    high, fp8 = (read_done(folder, stage)["result"]["held_out"]["loss"] for stage in ("pretrain", "fp8"))
    return {"curve": statistics.fmean(tail), "held_out": 100 * (fp8 / high - 1)}


def summarise(pairs: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over the pairs, for each of the two gaps."""
    result: dict[str, Any] = {"pairs": pairs}
    for name in ("curve", "held_out"):
        values = [pair[name] for pair in pairs.values()]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        result[name] = {"mean": statistics.fmean(values), "standard_error": error}
    return result


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table; exit status 1 when the mean gap leaves the band."""
    arguments = argparse.ArgumentParser(prog="python -m bench.fp8_gap", description=__doc__)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--quick", action="store_true", help="a third of the steps")
    arguments.add_argument("--run-dir", type=Path, default=Path("runs/fp8_gap"))
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = arguments.parse_intermixed_args(argv)
    if options.seeds < 1:
        print(f"error: --seeds: must be at least 1; got {options.seeds}", file=sys.stderr)
        return 2
    pairs: dict[int, dict[str, float]] = {}
    for seed in range(options.seeds):
        folder = options.run_dir / f"seed_{seed}"
        command = [
            sys.executable, "-m", "examples.run", "tiny", "--run-dir", str(folder), "--stages", STAGES,
            *(["--quick"] if options.quick else []),
            *(["--threads", str(options.threads)] if options.threads else []),
            f"train.seed={seed}", f"data.seed={seed}", "train.eval_every=0", *options.overrides,
        ]  # fmt: skip
        print(f"== pair {seed + 1} of {options.seeds}: {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
        pairs[seed] = measure(folder)
    result = summarise(pairs)
    (options.run_dir / "gaps.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'seed':>8}{'curve, %':>12}{'held-out, %':>14}")
    for seed, pair in pairs.items():
        print(f"{seed:8}{pair['curve']:+12.3f}{pair['held_out']:+14.3f}")
    curve, held_out = result["curve"], result["held_out"]
    print(f"{'mean':>8}{curve['mean']:+12.3f}{held_out['mean']:+14.3f}")
    print(f"{'+-':>8}{curve['standard_error']:12.3f}{held_out['standard_error']:14.3f}   (standard error)")
    inside = abs(curve["mean"]) < BAND
    print(f"mean gap of the smoothed curves {'inside' if inside else 'OUTSIDE'} the report's {BAND} %")
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main())
