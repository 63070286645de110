"""The model cut into pipeline stages, as even as whole layers allow.

Under DualPipe rank r holds stages r and PP - 1 - r and works on both alike, so what must be even is the sum over such a
pair, not the single stage. The pair at the ends has embedding, head and MTP modules (section 3.2.3 puts embedding and
head on one rank for the MTP module to share them) and fewer layers for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from examples.plan.model_costs import BlockCosts

Stage = tuple[BlockCosts, ...]


def cut(every: Sequence[BlockCosts], pp: int, weigh: Callable[[BlockCosts], float]) -> tuple[Stage, ...]:
    """All blocks in `pp` stages, in order; `pp` is 1 or even. weigh: what a block costs."""
    layers = [b for b in every if b.kind in ("dense", "moe")]
    first = [b for b in every if b.kind == "embedding"]
    last = [b for b in every if b.kind in ("mtp", "head")]
    if pp == 1:
        return (tuple(every),)
    ends = sum(map(weigh, first + last))
    typical = weigh(layers[-1])
    pairs = pp // 2
    inner = pairs - 1

    def heaviest(outer: int) -> tuple[float, int]:
        rest = len(layers) - outer
        per_pair = -(-rest // inner) if inner else 0
        return max(ends + outer * typical, per_pair * typical), outer

    allowed = [n for n in range(2 if pairs else 0, len(layers) + 1) if len(layers) - n >= 2 * inner]
    outer = min(allowed or [0], key=heaviest) if inner else len(layers)
    counts = _counts(len(layers), outer, pp, sum(map(weigh, last)) / typical)
    start, out = 0, []
    for index, count in enumerate(counts):
        part = layers[start : start + count]
        start += count
        out.append((*(first if index == 0 else ()), *part, *(last if index == pp - 1 else ())))
    return tuple(out)


def _counts(layers: int, outer: int, pp: int, extra: float) -> list[int]:
    """Layers of each stage; the ends' pair has `outer`, split so that the stage with head and MTP is no heavier."""
    back = max(0, min(outer, round((outer - extra) / 2)))
    counts = [0] * pp
    counts[0], counts[-1] = outer - back, back
    inner = pp // 2 - 1
    for pair in range(inner):
        share = (layers - outer) * (pair + 1) // inner - (layers - outer) * pair // inner
        counts[pair + 1], counts[pp - 2 - pair] = share - share // 2, share // 2
    return counts
