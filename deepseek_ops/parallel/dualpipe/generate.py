"""The schedules by name, with the rule that each one puts on its ranks and micro-batches, checked before any work."""

from __future__ import annotations

from ..._checks import fail
from .bidirectional import dualpipe, dualpipev
from .schedule import Schedule
from .unidirectional import interleaved, one_forward_one_backward, zb1p

NAMES = ("dualpipe", "dualpipev", "1f1b", "interleaved", "zb1p")


def generate(name: str, ranks: int, microbatches: int, *, chunks: int = 2) -> Schedule:
    """The schedule `name` of `NAMES` for `ranks` ranks and `microbatches` micro-batches per step, of all directions.

    `chunks` is the number of parts per rank of `interleaved`, without meaning elsewhere. Raises `ArgumentError` that
    names the rule and the nearest legal values.
    """
    if name not in NAMES:
        fail("schedule", f"must be one of {', '.join(NAMES)}", name)
    fewest_ranks, ranks_step = {"dualpipe": (2, 2), "dualpipev": (1, 1)}.get(name, (2, 1))
    _check("ranks", ranks, fewest_ranks, ranks_step, name, str(fewest_ranks))
    if name == "dualpipe":
        _check("microbatches", microbatches, 2 * ranks, 2, name, f"2 x ranks = {2 * ranks}")
        return dualpipe(ranks, microbatches)
    if name == "dualpipev":
        _check("microbatches", microbatches, 2 * ranks, 1, name, f"2 x ranks = {2 * ranks}")
        return dualpipev(ranks, microbatches)
    if name == "interleaved":
        _check("chunks", chunks, 2, 1, name, "2")
        _check("microbatches", microbatches, ranks, ranks, name, f"ranks = {ranks}")
        return interleaved(ranks, microbatches, chunks)
    _check("microbatches", microbatches, ranks, 1, name, f"ranks = {ranks}")
    return (one_forward_one_backward if name == "1f1b" else zb1p)(ranks, microbatches)


def _check(argument: str, value: object, fewest: int, step: int, name: str, bound: str) -> None:
    """Refuse what is below `fewest` or not a multiple of `step`; every `fewest` here is such a multiple."""
    rule = f"{name} needs " + (
        "" if step == 1 else "an even number, " if step == 2 else f"a multiple of {step}, "
    )
    rule += f"at least {bound}"
    if not isinstance(value, int) or isinstance(value, bool):
        fail(argument, rule, repr(value))
    if value < fewest:
        fail(argument, rule, f"{value} (nearest legal: {fewest})")
    if value % step:
        below = value - value % step
        fail(argument, rule, f"{value} (nearest legal: {below} and {below + step})")
