"""All layouts of a cluster, counted and ranked; and the nearest one that works, when the one asked for does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.plan.hardware import EFFICIENCIES, GIB, Efficiencies, Hardware
from examples.plan.plan import make_plan
from examples.plan.run import Result, count

MICRO_BATCHES = (1, 2, 4)


@dataclass
class Search:
    """What a search found: legal layouts that fit, fastest first; legal ones that do not; why the others were refused."""

    fitting: list[Result] = field(default_factory=list)
    too_large: list[Result] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def best(self) -> Result:
        """The fastest; `UserError` says why there is none."""
        if self.fitting:
            return self.fitting[0]
        if self.too_large:
            least = min(self.too_large, key=lambda result: result.bytes)
            raise UserError(f"memory: no layout fits; the least is {too_large(least)}")
        rules = "; ".join(f"{rule} ({n}x)" for rule, n in self.refused.most_common(3))
        raise UserError(f"layout: none is legal; refused by: {rules}")


def search(
    model: ModelConfig,
    hardware: Hardware,
    *,
    gpus: int,
    seq_len: int,
    batch: int | None,
    tokens: float,
    pps: Iterable[int] = (),
    eps: Iterable[int] = (),
    micro_batches: Iterable[int] = MICRO_BATCHES,
    context_parallel: int = 1,
    assumptions: Efficiencies = EFFICIENCIES,
    per_pipeline: int | None = None,
) -> Search:
    """Count every layout of `gpus` GPUs, or those with the given PP, EP, sequences per micro-batch.

    batch: sequences per step; none: whatever gives `per_pipeline` micro-batches.
    """
    found = Search()
    pps = tuple(pps) or tuple(n for n in _divisors(gpus) if n <= model.num_layers)
    eps = tuple(eps) or tuple(n for n in _divisors(model.num_experts) if n <= gpus)
    for pp in pps:
        for ep in eps:
            for micro in micro_batches:
                try:
                    sequences = batch
                    if sequences is None:
                        sequences = (per_pipeline or 1) * max(1, gpus // pp) * micro // context_parallel
                    plan = make_plan(
                        model,
                        hardware,
                        gpus=gpus,
                        pp=pp,
                        ep=ep,
                        seq_len=seq_len,
                        batch=sequences,
                        micro_batch=micro,
                        context_parallel=context_parallel,
                        assumptions=assumptions,
                    )
                except UserError as error:
                    found.refused[_rule(str(error))] += 1
                    continue
                result = count(plan, tokens)
                (found.fitting if result.fits else found.too_large).append(result)
    found.fitting.sort(key=lambda result: (result.step.seconds / result.plan.step_tokens, result.bytes))
    return found


def nearest(found: Search, pp: int, ep: int) -> Result | None:
    """The layout that fits with the least change, in octaves, of PP and EP; the fastest of equally near ones."""

    def distance(result: Result) -> float:
        layout = result.plan.layout
        return round(abs(math.log2(layout.pp / pp)) + abs(math.log2(layout.ep / ep)), 6)

    return min(found.fitting, key=distance, default=None)


def too_large(result: Result) -> str:
    """In words."""
    have = result.plan.hardware.memory.number / GIB
    return f"{short(result)} with {result.bytes / GIB:.1f} GiB of {have:.1f}"


def short(result: Result) -> str:
    """A layout in some characters."""
    plan, layout = result.plan, result.plan.layout
    micro = f", {plan.micro_batch} sequences per micro-batch" if plan.micro_batch > 1 else ""
    return f"PP {layout.pp} x DP {layout.dp}, EP {layout.ep}{micro}"


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _rule(message: str) -> str:
    """The rule without this layout's numbers, so that equal refusals count together."""
    kind, _, rest = message.partition(": ")
    rule = rest.split("; got")[0].split("; nearest")[0].split(", for ")[0].split(" (DP")[0]
    return f"{kind}: {''.join('N' if c.isdigit() else c for c in rule).replace('NN', 'N').replace('NN', 'N').replace('NN', 'N')}"
