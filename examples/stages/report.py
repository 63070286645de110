"""One page about the run, made from what the stages wrote: report.md, report.html (readable on a phone), pictures.

It reports only stages that have finished, so that it can be made again at any time, and it says which numbers miss the
report's or our own bounds. What it says about each stage is in `examples/report/`.
"""

from __future__ import annotations

from typing import Any

from examples.stages.stage import Context


def run(context: Context) -> dict[str, Any]:
    """Draw and write; returns the numbers of the summary."""
    from examples.report.compose import compose
    from examples.stages import STEPS

    stages = tuple(stage.name for stage in STEPS)
    findings = compose(context.root, context.folder, stages)
    print(f"  {context.folder / 'report.md'}", flush=True)
    for finding in findings:
        print(f"  {finding.key:32} {finding.value:<10.4g}{finding.verdict}", flush=True)
    return {finding.key: finding.value for finding in findings}
