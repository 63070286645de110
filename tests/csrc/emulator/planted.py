"""The cases of kernels/*.cu: what the tests of this folder share. Loads without the packages `tests` and `bench`."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
KERNELS = Path(__file__).with_name("kernels")
EMULATOR = ROOT / "csrc" / "emulator"

ASYNCHRONY = ("eager", "random", "lazy")
SCHEDULES = ("fifo", "random", "starve", "pct")
MODES = list(itertools.product(range(len(ASYNCHRONY)), range(len(SCHEDULES))))


class Planted:
    """The library of cases. A bug's expectation is a set of rules, each of which may name it; "data": wrong results."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("list", "run", "rules", "drop_sites"):
            getattr(self.library, f"planted_{name}").restype = ctypes.c_char_p
        for name in ("digest", "switches", "accesses", "clock_entries", "bank_conflicts"):
            getattr(self.library, f"planted_{name}").restype = ctypes.c_uint64
        self.expected: dict[str, list[set[str]]] = {}
        for item in self.library.planted_list().decode().split(";")[:-1]:
            name, bugs = item.split("=")
            self.expected[name] = [set(bug.split("|")) - {""} for bug in bugs.split(",")] if bugs else []
        self.rules = self.library.planted_rules().decode().split(";")[:-1]

    def run(
        self, case: str, bug: int = 0, seed: int = 0, asynchrony: int = 1, schedule: int = 1, check: bool = True,
        off: str = "", drop: tuple[str, str] = ("", ""),
    ) -> str:  # fmt: skip
        """The report; "data: ..." for wrong results without one; "" when all is well."""
        texts = [t.encode() for t in (off, *drop)]
        name = case.encode()
        return self.library.planted_run(
            name, bug, ctypes.c_uint64(seed), asynchrony, schedule, check, *texts
        ).decode()

    def digest(self) -> int:
        return self.library.planted_digest()


def rules_in(report: str) -> set[str]:
    """The rules that a report names."""
    return (
        {"data"} if report.startswith("data") else set(re.findall(r"^\[([a-z_.]+)\]", report, re.MULTILINE))
    )


def case_names() -> list[str]:
    """Of all cases, without building them."""
    return [
        n
        for f in sorted(KERNELS.glob("*.cu"))
        for n in re.findall(r"^CASE\((\w+)", f.read_text(), re.MULTILINE)
    ]
