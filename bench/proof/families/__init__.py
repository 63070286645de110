"""The families of the proof: one file each, found by being here. What a file holds:

    ORDER    its place among the families, which decides between steps of equal priority
    OPS      kernel, as claims and rows of benchmarks name it -> the ops of the library that it stands for
    STEPS    what there is to do, each with the function that does it
    CLAIMS   what silicon has to confirm

and the shapes that are measured. Its GPU tests are tests/bench/test_gpu_<family>.py. Importing a family imports neither
torch nor the benchmarks: `bench.prove` plans, and writes its page, without them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil

from ..claims import Claim
from ..steps import Step


@dataclasses.dataclass(frozen=True)
class Family:
    """What one file holds."""

    name: str
    ops: dict[str, tuple[str, ...]]
    steps: tuple[Step, ...]
    claims: tuple[Claim, ...]


@functools.cache
def families() -> tuple[Family, ...]:
    """All of them, in their order."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return tuple(
        Family(
            name,
            modules[name].OPS,
            tuple(dataclasses.replace(step, family=name) for step in modules[name].STEPS),
            tuple(modules[name].CLAIMS),
        )
        for name in sorted(names, key=lambda name: (modules[name].ORDER, name))
    )


def all_steps() -> list[Step]:
    """Every step, family by family."""
    return [step for family in families() for step in family.steps]


def all_claims() -> list[Claim]:
    """Every claim, family by family."""
    return [claim for family in families() for claim in family.claims]
