"""Table 2 of the report (and its neighbours): bubble, parameters and activations of a schedule in closed form.

Units are those of a pipeline with one stage per rank: F, B, W and F&B are what such a stage takes, and a chunk is
what it keeps alive for one micro-batch. tests/parallel/dualpipe/test_table2.py plays the schedules and finds the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """`bubble` is idle time of a step on the rank that idles most, `parameters` in stages per rank, `activations` in chunks.

    The bubble is exact where links cost nothing and, for zb1p, W is at most F and Bi; for DualPipe F = Bi, W at most F,
    and F&B at least B and at most F + B. Otherwise it is near, and simulation has the last word.
    """

    bubble: float
    parameters: float
    activations: float


def table2(
    name: str, stages: int, *, forward: float, backward: float, weight: float, pair: float, chunks: int = 2
) -> Row:
    """The row of a schedule whose model has `stages` stages: its number of ranks, and twice that for dualpipev.

    For `interleaved`, `stages` counts ranks; each holds `chunks` parts of 1/chunks of a stage.
    """
    if name == "1f1b":
        return Row((stages - 1) * (forward + backward), 1, stages)
    if name == "interleaved":
        return Row((stages - 1) * (forward + backward) / chunks, 1, stages + (stages - 1) / chunks)
    if name == "zb1p":
        return Row((stages - 1) * (forward + backward - 2 * weight), 1, stages)
    if name in ("dualpipe", "dualpipev"):
        return Row((stages // 2 - 1) * (pair + backward - 3 * weight), 2, stages + 1)
    raise KeyError(name)
