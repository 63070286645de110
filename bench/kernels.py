"""`make kernels`: what ptxas made of every kernel for sm_90a, as a table, with the faults that no kernel may have.

Needs nvcc and no GPU. Registers, stack, spills and barriers come from ptxas' own report, kept beside each object by
the build; instructions come from the object's machine code through cuobjdump and nvdisasm (the toolkit's, or the pip
wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). csrc/kernels.json says what each kernel must and must not have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepseek_ops import _toolchain

ROOT = Path(__file__).resolve().parents[1]
KERNEL_LIST = ROOT / "csrc" / "kernels.json"
FOLDER = (
    ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
)  # the installation's: nothing is compiled twice
# Instruction families worth a column: what moves, multiplies, synchronises, and what should not be there.
SHOWN = (
    *("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "LDGSTS", "LDSM", "STSM", "SYNCS"),
    *("USETMAXREG", "BAR", "UCGABAR", "ATOM", "RED", "LDL", "STL"),
)


@dataclass
class Kernel:
    """One kernel instantiation of the build."""

    file: str
    mangled: str
    name: str  # demangled, short
    registers: int = 0
    shared_bytes: int = 0  # static; dynamic shared memory is given at the launch
    stack_bytes: int = 0
    spill_bytes: int = 0  # stores and loads
    barriers: int = 0
    instructions: Counter[str] = field(
        default_factory=Counter
    )  # instruction family -> count; empty without a disassembler
    family: str = ""  # of csrc/kernels.json

    def blocks_by_registers(self, threads: int) -> int:
        """How many fit on an SM by registers: warps are dealt to 4 schedulers with 512 registers a lane each."""
        per_scheduler = 512 // (-(-self.registers // 8) * 8)
        return 4 * per_scheduler // -(-threads // 32)


@dataclass
class Report:
    """All kernels of a build, and what is wrong with them in sentences."""

    kernels: list[Kernel]
    problems: list[str]
    notes: list[str]  # known exceptions
    disassembled: bool
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # file -> its last compile, where ninja noted that


class Unavailable(RuntimeError):
    """Nothing can be said here; the text says what is missing."""


# ---- building ------------------------------------------------------------------------------------------------------


def build(test_kernels: Path | None = None, file: str | None = None) -> Path:
    """Compile the kernels with nvcc where they are out of date, or one file; returns the folder of objects and logs."""
    output = f"kernels/{file}.o"
    with _toolchain.locked(FOLDER), contextlib.redirect_stdout(sys.stderr):
        if file and _toolchain.refresh(FOLDER, [output]):
            return FOLDER / "kernels"
        problem = _toolchain.problem("cuda")
        if problem:
            raise Unavailable(problem)
        try:
            import pybind11
        except ImportError:
            raise Unavailable("no pybind11, which the package's build needs") from None

        targets = [target for target in _toolchain.TARGETS if not _toolchain.problem(target)]
        settings = {"DEEPSEEK_OPS_TEST_KERNELS": test_kernels} if test_kernels else {}
        _toolchain.configure(ROOT, FOLDER, targets, pybind11.get_cmake_dir(), **settings)
        # A kernel that ptxas refuses has left its log, which is what we are here to show.
        with contextlib.suppress(subprocess.CalledProcessError):
            one = file and (FOLDER / "build.ninja").exists()
            _toolchain.build(
                FOLDER, output if one else f"{'test' if test_kernels else 'kernels'}_device_objects"
            )
    return FOLDER / ("test" if test_kernels else "kernels")


def of_file(name: str) -> tuple[list[Kernel], str, Path]:
    """Of one file of csrc/kernels.json, brought up to date: its kernels, ptxas' report, the object (absent if refused)."""
    compiled = build(file=name) / f"{name}.o"
    report = compiled.with_name(f"{compiled.name}.log")
    log = report.read_text() if report.exists() else ""
    return parse_log(log, f"{name}.cu"), log, compiled


# ---- reading --------------------------------------------------------------------------------------------------------


def collect(test_kernels: Path | None = None) -> Report:
    """Build, read the logs and the machine code, and judge them; of the library, or of another list of kernels."""
    objects = build(test_kernels)
    listed = json.loads((test_kernels or KERNEL_LIST).read_text())
    names = {Path(path).stem: family["name"] for family in listed["families"] for path in family["kernels"]}
    kernels: list[Kernel] = []
    problems: list[str] = []
    notes: list[str] = []
    tool = disassembler()
    for name, family in names.items():
        compiled, report = objects / f"{name}.o", objects / f"{name}.o.log"
        log = report.read_text() if report.exists() else ""
        found = parse_log(log, f"{name}.cu")
        for kernel in found:
            kernel.family = family
        if not compiled.exists():
            problems.append(f"{name}.cu: does not compile; see {report}")
        elif tool:
            sass = disassemble(tool, compiled)
            for kernel in found:
                kernel.instructions = families(sass.get(kernel.mangled, []))
        kernels += found
        problems += [f"{name}.cu: {line}" for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]
        if name in listed["lenient"]:
            notes.append(f"{name}.cu may spill: {listed['lenient'][name]}")
        else:
            problems += [f"{k.name}: {k.spill_bytes} bytes of spills" for k in found if k.spill_bytes]
            problems += [f"{k.name}: {k.stack_bytes} bytes of local memory" for k in found if k.stack_bytes]
        if not found:
            problems.append(f"{name}.cu: holds no kernel")
    if tool:
        problems += check_instructions([k for k in kernels if k.instructions], listed["sass"])
    seconds = {f"{name}.cu": s for name, s in compile_seconds(objects).items() if name in names}
    return Report(kernels, problems, notes, tool is not None, seconds)


def compile_seconds(objects: Path) -> dict[str, float]:
    """Seconds of each object's last compile, as ninja noted them (milliseconds: begin, end); a cache makes them small."""
    log = objects.parent / ".ninja_log"
    found = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        fields = line.split("\t")
        if len(fields) == 5 and fields[3].endswith(".o") and Path(fields[3]).parent.name == objects.name:
            found[Path(fields[3]).stem] = (int(fields[1]) - int(fields[0])) / 1000
    return found


def parse_log(log: str, file: str) -> list[Kernel]:
    """The kernels that ptxas -v reports."""
    kernels = []
    for block in log.split("Compiling entry function '")[1:]:
        mangled = block.split("'", 1)[0]
        kernel = Kernel(file, mangled, mangled)
        if found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ):
            kernel.stack_bytes, stores, loads = map(int, found.groups())
            kernel.spill_bytes = stores + loads
        for attribute, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("barriers", r"used (\d+) barriers"),
            ("shared_bytes", r"(\d+) bytes smem"),
        ):
            if found := re.search(pattern, block):
                setattr(kernel, attribute, int(found[1]))
        kernels.append(kernel)
    for kernel, name in zip(kernels, demangle([k.mangled for k in kernels]), strict=True):
        kernel.name = short_name(name)
    return kernels


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names by c++filt, or unchanged where that is not installed."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short_name(name: str) -> str:
    """`fp8_gemm_kernel<Config<128, 128, bf16, 2>>` out of the full signature."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:unsigned )?(?:int|long|char|bool|short)\)", "", name)  # casts of template arguments
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:position]
            break
    return re.sub(r"\w+::", "", name).replace("> >", ">>")


def disassembler() -> str | None:
    """cuobjdump of PATH, the toolkit, or the pip wheel."""
    nvcc = _toolchain.find_nvcc()
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [*([Path(nvcc).resolve().parent] if nvcc else []), *sorted(wheels.glob("cu*/bin"), reverse=True)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    found = shutil.which("cuobjdump", path=path)
    return (
        found if found and shutil.which("nvdisasm", path=f"{Path(found).parent}{os.pathsep}{path}") else None
    )


def disassemble(tool: str, binary: Path) -> dict[str, list[str]]:
    """Mangled name of a kernel: its instructions in order, with operands, without predicates."""
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [tool, "-sass", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\{?\s*([A-Z].*?) *;", re.MULTILINE)
    blocks = (block.split("\n", 1) for block in text.split("Function : ")[1:])
    return {name.strip(): line.findall(code) for name, code in blocks}


def families(instructions: Sequence[str]) -> Counter[str]:
    """How often each instruction family occurs; families are the names up to the first dot."""
    return Counter(re.match(r"\w+", instruction)[0] for instruction in instructions)


def check_instructions(kernels: Sequence[Kernel], rules: Sequence[dict]) -> list[str]:
    """What csrc/kernels.json asks of the machine code and does not get."""
    problems = []
    for kernel in kernels:
        matching = [rule for rule in rules if re.fullmatch(rf"{rule['kernel']}(<.*)?", kernel.name)]
        if not matching:
            problems.append(
                f"{kernel.name}: csrc/kernels.json does not say which instructions it should have"
            )
        for rule in matching:
            problems += [f"{kernel.name}: has no {i}" for i in rule["has"] if not kernel.instructions[i]]
            problems += [f"{kernel.name}: has {i}" for i in rule["lacks"] if kernel.instructions[i]]
    return problems


# ---- showing -------------------------------------------------------------------------------------------------------


def table(kernels: Sequence[Kernel]) -> str:
    """One line for each kernel, family by family."""
    width = max((len(k.name) for k in kernels), default=6)
    columns = f"{'regs':>4} {'smem':>6} {'stack':>5} {'spill':>5} {'bar':>3} {'size':>5}  instructions"
    lines = []
    for family in dict.fromkeys(k.family for k in kernels):
        lines += ["", f"{family:{width}} {columns}"]
        for k in kernels:
            if k.family == family:
                shown = "  ".join(f"{name} {k.instructions[name]}" for name in SHOWN if k.instructions[name])
                numbers = (
                    f"{k.registers:4} {k.shared_bytes:6} {k.stack_bytes:5} {k.spill_bytes:5} {k.barriers:3}"
                )
                lines.append(f"{k.name:{width}} {numbers} {k.instructions.total():5}  {shown}".rstrip())
    return "\n".join(lines[1:])


def totals(report: Report) -> str:
    """The last line."""
    names = {k.name.split("<", 1)[0] for k in report.kernels}
    files = {k.file for k in report.kernels}
    known = [seconds for file, seconds in report.seconds.items() if file in files]
    compiled = f"{sum(known):.0f} s of compiling" if len(known) == len(files) else "compile time unknown"
    return (
        f"{len(report.kernels)} instantiations of {len(names)} kernels in {len(files)} files, "
        f"{sum(k.spill_bytes for k in report.kernels)} bytes of spills, {compiled}, {len(report.problems)} faults"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a kernel has a fault, 2 where nothing can be built here."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument(
        "--list", type=Path, help="another list of kernels, such as tests/csrc/toy/kernels.json"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    try:
        report = collect(options.list and options.list.resolve())
    except Unavailable as reason:
        print(f"no table: {reason}", file=sys.stderr)
        return 2
    if options.json:
        record = {"kernels": [vars(k) for k in report.kernels], "problems": report.problems}
        print(json.dumps({**record, "compile_seconds": report.seconds}, indent=2))
    else:
        print(table(report.kernels))
        if not report.disassembled:
            print("no instructions: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        for note in report.notes:
            print(f"note: {note}")
        print(totals(report))
    for problem in report.problems:
        print(f"fault: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
