"""Every step of our kernels that can be left out is missed by the checker or by the bits, or its survival is explained."""

from __future__ import annotations

import pytest

from tests.csrc import mutation

families = pytest.mark.parametrize("family", mutation.FAMILIES)


@families
def test_mutants_are_killed(family):
    """The first kernel of each family, a few seeds."""
    kernel = mutation.kernels(family)[0]
    outcomes = mutation.mutate(kernel, seeds=3, limit=30)
    print(mutation.table(kernel.name, outcomes))
    assert outcomes
    assert mutation.unexplained(outcomes) == []


@pytest.mark.slow
@families
def test_all_mutants_are_killed(family):
    for kernel in mutation.kernels(family):
        outcomes = mutation.mutate(kernel, seeds=8)
        print(mutation.table(kernel.name, outcomes))
        assert mutation.unexplained(outcomes) == []
