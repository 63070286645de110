"""The checker finds what is planted and accepts what is legal, on every schedule; and its runs can be repeated."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest

from tests.csrc.emulator.planted import (
    ASYNCHRONY,
    KERNELS,
    MODES,
    SCHEDULES,
    case_names,
    rules_in,
)

by_case = pytest.mark.parametrize("case", case_names())


def missed(planted, case, seeds) -> list[str]:
    """Bugs that fewer than 95 % of the runs name."""
    wrong = []
    for bug, expected in enumerate(planted.expected[case], 1):
        if not expected:  # a number of the study that this kernel does not have, or a known gap
            continue
        reports = [planted.run(case, bug, seed, *mode) for seed in range(seeds) for mode in MODES]
        found = sum(bool(rules_in(report) & expected) for report in reports)
        if found < 0.95 * len(reports):
            other = next(r for r in reports if not rules_in(r) & expected)
            wrong.append(
                f"{case} bug {bug}: {found} of {len(reports)} runs name {expected}; another: {other!r}"
            )
    return wrong


def refused(planted, case, seeds) -> list[str]:
    """Reports about the legal kernel of a case."""
    reports = (planted.run(case, 0, seed, *mode) for seed in range(seeds) for mode in MODES)
    return [report for report in reports if report]


@by_case
def test_every_bug_is_found(planted, case):
    assert missed(planted, case, seeds=1) == []


@by_case
def test_legal_kernels_are_accepted(planted, case):
    assert refused(planted, case, seeds=6) == []


@pytest.mark.slow
@by_case
def test_every_bug_is_found_on_many_seeds(planted, case):
    assert missed(planted, case, seeds=20) == []


@pytest.mark.slow
@by_case
def test_legal_kernels_are_accepted_on_many_seeds(planted, case):
    assert refused(planted, case, seeds=50) == []  # 600 runs


@by_case
def test_legal_kernels_run_without_the_checker(planted, case):
    for mode in MODES:
        assert planted.run(case, 0, 3, *mode, check=False) == ""


@pytest.fixture(scope="module")
def witnesses(planted) -> dict[str, list[tuple[str, int]]]:
    """rule -> planted bugs that it names on seed 0."""
    found: dict[str, list[tuple[str, int]]] = {rule: [] for rule in planted.rules}
    for case, bugs in planted.expected.items():
        for bug in range(1, len(bugs) + 1):
            for rule in rules_in(planted.run(case, bug)) - {"data"}:
                found[rule].append((case, bug))
    return found


def test_every_rule_has_a_planted_bug(witnesses):
    assert [rule for rule, bugs in witnesses.items() if not bugs] == []


def test_every_rule_can_be_switched_off(planted, witnesses):
    for rule, bugs in witnesses.items():
        for case, bug in bugs[:4]:
            report = planted.run(case, bug, off=rule)
            assert rule not in rules_in(report), report
            # Either the kernel went on, or the report says that it could not: never a silent half of a result.
            assert report == "" or rules_in(report), report


def test_rules_are_documented(planted):
    readme = (KERNELS.parents[3] / "csrc" / "emulator" / "README.md").read_text()
    assert [rule for rule in planted.rules if f"`{rule}`" not in readme] == []


@by_case
def test_equal_seeds_give_equal_runs(planted, case):
    for bug in (0, 1):
        for mode in [(1, 1), (2, 2), (1, 3)]:
            first = planted.run(case, bug, 5, *mode), planted.digest()
            assert (planted.run(case, bug, 5, *mode), planted.digest()) == first


def test_other_seeds_give_other_runs(planted):
    digests = set()
    for seed in range(8):
        assert planted.run("gemm", seed=seed) == ""
        digests.add(planted.digest())
    assert len(digests) == 8


@pytest.mark.parametrize(("case", "bug"), [("gemm", 4), ("communication", 1), ("memory_flag", 7)])
def test_a_report_says_how_to_replay_it(planted, case, bug):
    report = planted.run(case, bug, 12345678901234567890, 2, 3)
    seed, asynchrony, schedule = re.search(r"seed=(\d+), asynchrony=(\w+), schedule=(\w+)", report).groups()
    planted.run(case, bug, 1)
    again = planted.run(case, bug, int(seed), ASYNCHRONY.index(asynchrony), SCHEDULES.index(schedule))
    assert again == report


def test_another_process_replays_the_same_run(planted):
    """Addresses differ there, decisions and reports do not."""
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(KERNELS.parent)!r}); import planted\n"
        f"p = planted.Planted(ctypes.CDLL({planted.library._name!r}))\n"
        "print(repr([(p.run(c, b, 7), p.digest()) for c, b in [('gemm', 4), ('cluster_ring', 0), ('communication', 4)]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = [
        (planted.run(c, b, 7), planted.digest())
        for c, b in [("gemm", 4), ("cluster_ring", 0), ("communication", 4)]
    ]
    assert result.stdout.strip() == repr(mine)


def test_cost_of_a_block_does_not_grow_with_the_grid(planted):
    """Counted, not timed: what is read and written, who runs when, and the entries of the clocks that order it all."""

    def cost(blocks):
        counts = []
        for seed in range(5):
            assert planted.run("cost", blocks, seed) == ""
            library = planted.library
            taken = (library.planted_accesses(), library.planted_switches(), library.planted_clock_entries())
            counts.append([count / blocks for count in taken])
        return [min(column) for column in zip(*counts, strict=True)]

    few, many = cost(2), cost(16)
    assert many[0] == few[0] > 0  # accesses
    assert many[1] == pytest.approx(
        few[1], rel=0.1
    )  # switches; a wait that finds its phase complete has none
    assert 0 < many[2] < 1.2 * few[2]  # entries of clocks


def test_bank_conflicts_are_counted(planted):
    assert planted.run("gemm") == ""
    assert planted.library.planted_bank_conflicts() == 0
    planted.run("gemm", 14)  # rows of stmatrix without the swizzle
    assert planted.library.planted_bank_conflicts() > 100


# bytes of a read, bytes between lanes, lanes that read: wavefronts of a request, and how few would do
@pytest.mark.parametrize(
    ("size", "stride", "lanes", "wavefronts", "least"),
    [
        (4, 4, 32, 1, 1),  # neighbours
        (4, 128, 32, 32, 1),  # a column of a 32 x 32 matrix: one bank
        (4, 132, 32, 1, 1),  # the same with a padded row
        (4, 8, 32, 2, 1),  # every second word
        (4, 0, 32, 1, 1),  # one word for all: a broadcast
        (1, 1, 32, 1, 1),  # four lanes to a word
        (1, 128, 32, 32, 1),
        (8, 8, 32, 2, 2),  # two half warps, each all banks
        (8, 128, 32, 32, 2),  # 16 pairs in two banks, twice
        (16, 16, 32, 4, 4),  # four quarters
        (16, 128, 32, 32, 4),  # 8 in four banks, four times
        (16, 144, 32, 4, 4),
        (-16, 16, 32, 4, 4),  # a vector that g++ takes apart
        (-16, 128, 32, 32, 4),
        (4, 128, 5, 5, 1),  # the rest of the warp is masked
        (16, 16, 8, 1, 1),
    ],
)
def test_bank_conflicts_of_plain_accesses(planted, size, stride, lanes, wavefronts, least):
    run = planted.library.planted_banks
    run.restype = ctypes.c_char_p

    def sites(count, seed):
        text = run(size, stride, lanes, count, ctypes.c_uint64(seed)).decode()
        return [site.split("|") for site in text.split(";")[:-1]]

    for seed in range(3):
        found = sites(1, seed)
        digest = planted.digest()
        read = [site for site in found if site[1] == f"read of {abs(size)} B"]
        assert [int(n) for n in read[0][2:]] == [6, 6 * wavefronts, 6 * least, wavefronts - least]
        assert re.search(r"bank_conflicts\.cu:\d+$", read[0][0])
        write = [site for site in found if site[1] == "write of 4 B"]
        assert len(read) == len(write) == 1 and write[0][2:] == ["256", "256", "256", "0"]
        assert planted.library.planted_bank_conflicts() == 6 * (wavefronts - least)
        assert sites(0, seed) == [] and planted.digest() == digest  # watching changes no decision


def test_names_are_unique():
    assert len(set(case_names())) == len(case_names()) >= 40
