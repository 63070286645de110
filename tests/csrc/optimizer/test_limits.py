"""Lists of more than 2^31 elements and limits of the optimizer's host side, in C++: limits_test.cpp."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.building import output_of, program


def test_far_elements_long_lists_and_limits():
    output_of(program("optimizer_limits", [Path(__file__).with_name("limits_test.cpp")]))
