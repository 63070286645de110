"""The system call filter, executed by an interpreter of classic BPF: what it refuses, allows, and for which arguments."""

import errno
import re
import struct
from pathlib import Path

import pytest

from examples.rewards import seccomp

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = "allow", "kill"


def run(program, machine, number, first=0, arch=None):
    """Outcome of the filter for a call: "allow", "kill" or an errno."""
    data = struct.pack("=iIQQ", number, arch or ARCH[machine], 0, first & (1 << 64) - 1)
    steps = list(struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, true, false, k = steps[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            action = k & 0xFFFF0000
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(action, k & 0xFFFF)
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += true if holds else false


@pytest.mark.parametrize("machine", ARCH)
def test_denied_and_allowed(machine):
    column = list(ARCH).index(machine)
    shared, alone = (seccomp.build_filter(machine, 1234, shared=shared) for shared in (True, False))
    for program in (shared, alone):
        for name, numbers in seccomp.DENIED.items():
            if numbers[column] is not None:
                assert run(program, machine, numbers[column]) == errno.EPERM, name
        read, execve = ((0, 59), (63, 221))[column]
        assert run(program, machine, read) == run(program, machine, execve) == ALLOW
        assert run(program, machine, seccomp.CLONE[column], 0x11) == ALLOW  # fork
        assert run(program, machine, seccomp.CLONE[column], 0x3D0F00) == ALLOW  # a thread
        for bit in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
            assert run(program, machine, seccomp.CLONE[column], 0x11 | bit) == errno.EPERM
        assert run(program, machine, seccomp.CLONE3[column]) == errno.ENOSYS
        assert run(program, machine, 452) == run(program, machine, 1000) == errno.ENOSYS
        assert run(program, machine, read, arch=0x40000003) == KILL  # i386
        assert run(program, machine, 0x40000000 | read) == errno.EPERM  # x32
    pids = {0: ALLOW, 1234: ALLOW, 1: errno.EPERM, 1235: errno.EPERM, -1: errno.EPERM}
    for name, numbers in (seccomp.BY_PID | seccomp.SIGNALS).items():
        for pid, expected in pids.items():
            assert run(shared, machine, numbers[column], pid) == expected, (name, pid)
            free = ALLOW if name in seccomp.SIGNALS else expected
            assert run(alone, machine, numbers[column], pid) == free, (name, pid)
    for name, numbers in seccomp.ATTRIBUTES.items():
        if numbers[column] is not None:
            assert run(alone, machine, numbers[column]) == ALLOW, name
            assert run(shared, machine, numbers[column]) == errno.EPERM, name


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_the_kernels(column, header):
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", Path(header).read_text())
    kernel = {name: int(number) for name, number in found}
    ours = seccomp.DENIED | seccomp.BY_PID | seccomp.SIGNALS | seccomp.ATTRIBUTES
    for name, numbers in {**ours, "clone": seccomp.CLONE, "clone3": seccomp.CLONE3}.items():
        if name in kernel:
            assert numbers[column] == kernel[name], name
        else:
            assert numbers[column] is None, name
