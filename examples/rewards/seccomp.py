"""Which system calls a sandboxed program may not make, as a classic BPF program for seccomp.

Namespaces and Landlock decide what a program can reach; the filter takes away the calls that no answer to a question
needs and that holes in those two are usually made of: new namespaces, mounts, sockets, io_uring, tracing, keys, kernel
modules. Everything else is allowed. Calls that change another process's limits or scheduling must name the caller itself;
where processes share their PID namespace with others, so must signals, and no file's mode, owner or times are changed by
its path.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

# Numbers on x86_64 and aarch64 (None: not there), from the kernel's unistd tables.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory and the kernel's tracing
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    # io_uring makes calls that no filter sees
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # network; socketpair, which asyncio needs, stays
    "socket": (41, 198),
    # memory that belongs to no process and so is in no limit
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mlock": (149, 228), "mlockall": (151, 230),
    # the machine
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "personality": (135, 92), "syslog": (103, 116), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
    "setpriority": (141, 140), "ioprio_set": (251, 30),
}  # fmt: skip
# The first argument must be 0 or the caller, as it is before it forks.
BY_PID: dict[str, tuple[int | None, int | None]] = {
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip
# The same, where processes that are not the program's can be named.
SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
# Where other files of the user can be named: Landlock does not cover these.
ATTRIBUTES: dict[str, tuple[int | None, int | None]] = {
    "pidfd_send_signal": (424, 424), "chmod": (90, None), "fchmodat": (268, 53), "chown": (92, None),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "removexattr": (197, 14), "lremovexattr": (198, 15),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
NEW_CALLS = 450  # from here on: calls younger than the tables above (fchmodat2 is the first that matters)
_NAMESPACE_FLAGS = 0x7E020080  # all CLONE_NEW*, the time namespace included
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def supported() -> bool:
    """Whether the tables know this machine."""
    return sys.platform == "linux" and platform.machine() in _AUDIT_ARCH


def _step(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, k)


def build_filter(machine: str, own_pid: int, *, shared: bool) -> bytes:
    """The filter for `machine` ("x86_64" or "aarch64") and the process `own_pid`. shared: other processes and the machine's
    files can be named, so apply SIGNALS and ATTRIBUTES too."""
    column = list(_AUDIT_ARCH).index(machine)
    refuse, missing = _step(_RETURN, _ERRNO | errno.EPERM), _step(_RETURN, _ERRNO | errno.ENOSYS)
    allow = _step(_RETURN, _ALLOW)
    steps = [
        _step(_LOAD, _ARCH),
        _step(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _step(_RETURN, _KILL),  # a call of another instruction set has other numbers
        _step(_LOAD, _NUMBER),
        _step(_JUMP_GREATER_EQUAL, _X32, 0, 1),
        refuse,
        _step(_JUMP_GREATER_EQUAL, NEW_CALLS, 0, 1),
        missing,  # "not implemented": the C library then uses the older call
        _step(_JUMP_EQUAL, CLONE3[column], 0, 1),
        missing,  # its flags are in memory, where no filter can look
        _step(_JUMP_EQUAL, CLONE[column], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_JUMP_ANY_BIT, _NAMESPACE_FLAGS, 0, 1),
        refuse,
        allow,
    ]
    for numbers in (DENIED | ATTRIBUTES if shared else DENIED).values():
        if (number := numbers[column]) is not None:
            steps += [_step(_JUMP_EQUAL, number, 0, 1), refuse]
    for numbers in (BY_PID | SIGNALS if shared else BY_PID).values():
        if (number := numbers[column]) is not None:
            steps += [
                _step(_JUMP_EQUAL, number, 0, 5),
                _step(_LOAD, _FIRST_ARGUMENT),
                _step(_JUMP_EQUAL, 0, 2, 0),
                _step(_JUMP_EQUAL, own_pid, 1, 0),
                refuse,
                allow,
            ]
    return b"".join([*steps, allow])
