"""What reports say: what happened, where on both sides, who, and what would have ordered it; and that a fault is a report."""

from __future__ import annotations

import re
import time

import pytest

from tests.csrc.emulator.planted import KERNELS, rules_in


def line(file: str, text: str, nth: int = 0) -> str:
    """ "file:line" of the nth line of a kernel that contains the text."""
    lines = (KERNELS / file).read_text().splitlines()
    return f"{file}:{[i for i, content in enumerate(lines, 1) if text in content][nth]}"


def test_a_missing_proxy_fence(planted):
    report = planted.run("gemm", 5, seed=1)
    assert re.search(
        r"\[proxy\] read of shared memory \+0x[0-9a-f]+\n"
        r"    by   block \(0,0,0\) engine, issued by warp [04] lane 0: TMA store at "
        + line("gemm.cu", "tma_store(")
        + r"\n    and  write by block \(0,0,0\) warp \d lane \d+: stmatrix at "
        + line("gemm.cu", "stmatrix<4>(")
        + r"\n    are ordered, but .* a fence_proxy_async after the write .* would do it \(PTX ISA",
        report,
    ), report


def test_a_race_names_both_lines(planted):
    report = planted.run("memory_flag", 1, seed=1)
    assert "[race] read of buffer 'payload' +0x" in report
    assert re.search(
        r"by   block \([12],0,0\) warp 0 lane \d+: a plain access at memory_order.cu:\d+", report
    ), report
    assert "store at " + line("memory_order.cu", "store<Order::relaxed, Scope::gpu>(payload") in report
    assert "no barrier, mbarrier phase, release/acquire or wait connects them" in report


def test_a_deadlock_says_who_waits_where(planted):
    started = time.monotonic()
    report = planted.run("gemm", 18, seed=1)
    assert time.monotonic() - started < 5
    assert "[deadlock] no thread can run and no engine has work left" in report
    wait = re.escape(line("gemm.cu", "mbarrier_wait(&s.full[stage]"))
    init = re.escape(line("gemm.cu", "mbarrier_init(&s.full[i]"))
    assert re.search(
        rf"  block \(0,0,0\) warps 0-7: {wait} waits for the mbarrier at shared memory \+0x\w+ \(init {init}\) parity 0; "
        r"it is in phase 0, pending arrivals 1/1, tx-count 0 \[256 lanes\]",
        report,
    ), report
    assert re.search(r"  block \(0,0,0\) warp 8: gemm.cu:\d+ waits for the mbarrier .* \[1 lane\]", report), (
        report
    )


def test_a_livelock_says_what_is_polled(planted):
    started = time.monotonic()
    report = planted.run("communication", 5, seed=1)
    assert time.monotonic() - started < 5
    poll = line("communication.cu", "load<Order::acquire, Scope::sys>(receive.flag")
    assert (
        f"  rank 1 block (0,0,0) warps 0-2: {poll} polls buffer 'flag' +0x0, which is 0 [3 lanes]" in report
    )


def test_bytes_that_do_not_add_up(planted):
    report = planted.run("gemm", 6, seed=1)
    assert re.search(
        r"bulk load of 16 bytes was issued in phase 0 of its mbarrier .* and lands in phase 1", report
    )
    report = planted.run("mbarrier_bytes", 2)
    assert "the block ends with tx-count 128 in the mbarrier at shared memory +0x100" in report


def test_past_the_end_of_a_tensor(planted):
    report = planted.run("bounds", 1)
    assert "[global.bounds] read of 4 bytes at 0 bytes past the end of buffer 'in'" in report
    assert line("bounds.cu", "if (bug == 1)") in report


def test_a_scope_that_is_switched_off_is_not_silent(planted):
    """A kernel that cannot go on must not look like one that went well."""
    report = planted.run("mbarrier_misuse", 7, off="mbarrier.misuse")
    assert "[stopped]" in report


@pytest.mark.parametrize(
    ("bug", "texts"),
    [
        (1, ["[fault]", "invalid access to address 0x10", line("faults.cu", "if (bug == 1)")]),
        (2, ["[fault]", "stack overflow: local arrays and recursion exceed 131072 bytes"]),
        (3, ["[fault]", "integer division by zero", line("faults.cu", "if (bug == 3)")]),
        (4, ["[trap]", "sixty-four is too many", line("faults.cu", "if (bug == 4)")]),
        (5, ["[livelock]", "buffer 'out' +0x8 with plain loads", "use load<Order::acquire, scope>"]),
        (6, ["[livelock]", "polls buffer 'out' +0x8, which is 0 [1 lane]", "63 of 64 threads have arrived"]),
        (7, ["[deadlock]", "waits at barrier 0"]),
        (8, ["[trap]", "nobody came"]),  # a deadline passes although nothing else happens
    ],
)
def test_a_fault_is_a_report_and_the_process_goes_on(planted, bug, texts):
    for check in (True, False):
        if bug == 5 and not check:
            continue  # nobody watches plain loads there
        started = time.monotonic()
        report = planted.run("faults", bug, check=check)
        assert time.monotonic() - started < 5
        assert "warp 1 lane 1" in report or "warp 1: faults.cu" in report or bug == 7, report
        for text in texts:
            assert text in report, report
        assert planted.run("faults", 0, check=check) == ""
        assert planted.run("gemm", 0, check=check) == ""


def test_many_hazards_are_one_report_each(planted):
    report = planted.run("gemm", 4, seed=2)
    kinds = re.findall(r"^\[", report, re.MULTILINE)
    assert 1 <= len(kinds) <= 9
    assert report.startswith(f"{len(kinds)} hazard")
    assert rules_in(report)
