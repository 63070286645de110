"""Runs a probe on the device and on the emulator, compares bit for bit, keeps what the device said as golden vectors.

A probe is a list of cases; a case is integer parameters, input arrays and output arrays for one of the kernels in
bench/probes. `expected` is what the specification says, worked out in Python by hands that wrote neither the kernel
nor the emulator: tests hold the emulator to it, so that a shared misreading of the PTX ISA has to happen three times.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .builds import BuildError, build
from .families.ground import PROBES

Array = np.ndarray[Any, np.dtype[Any]]
GOLDEN_SCHEMA = 1
FIRST = 8  # differences that a report lists


@dataclass(frozen=True)
class Case:
    """One call of `probe_run`. Buffers are passed in order: inputs, then outputs (with their initial content)."""

    name: str
    parameters: tuple[int, ...]
    inputs: tuple[Array, ...]
    outputs: dict[str, Array]
    expected: dict[str, Array] = field(default_factory=dict)

    def digest(self) -> str:
        """Of everything that decides the answer: a golden vector of other inputs is stale."""
        sha = hashlib.sha256(repr(self.parameters).encode())
        for array in (*self.inputs, *self.outputs.values()):
            sha.update(f"{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:16]


class ProbeError(RuntimeError):
    """The kernel of a probe did not run: the device's error or the emulator's report."""


def cases(probe: str) -> list[Case]:
    """The cases of a probe, the same on every call and machine."""
    source = Path(PROBES[probe][3]).stem
    module = importlib.import_module(f"{__package__}.probe_{source}")
    make: Callable[[], list[Case]] = getattr(module, probe)
    result = make()
    names = [case.name for case in result]
    assert len(set(names)) == len(names), f"{probe}: two cases have one name"
    return result


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class Library:
    """A compiled probe."""

    def __init__(self, path: Path) -> None:
        self._run = ctypes.CDLL(str(path)).probe_run
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [
            ctypes.POINTER(ctypes.c_int64), ctypes.c_uint32, ctypes.POINTER(_Buffer), ctypes.c_uint32,
        ]  # fmt: skip

    def run(self, case: Case) -> dict[str, Array]:
        """The outputs of one case; ProbeError when the kernel did not run."""
        outputs = {name: np.array(array, copy=True, order="C") for name, array in case.outputs.items()}
        arrays = [np.ascontiguousarray(array) for array in case.inputs] + list(outputs.values())
        buffers = (_Buffer * len(arrays))(*[_Buffer(a.ctypes.data, a.nbytes) for a in arrays])
        parameters = (ctypes.c_int64 * len(case.parameters))(*case.parameters)
        error = self._run(parameters, len(case.parameters), buffers, len(arrays))
        if error is not None:
            raise ProbeError(error.decode(errors="replace"))
        return outputs


def library(probe: str, target: str) -> Library:
    """The library of a probe, built if need be."""
    return Library(build(PROBES[probe][3], target))


def run(probe: str, target: str) -> dict[str, dict[str, Array]]:
    """Every case of a probe on "cuda" or "emulated"."""
    lib = library(probe, target)
    return {case.name: lib.run(case) for case in cases(probe)}


# ---- comparison -------------------------------------------------------------------------------------------------


def bits(array: Array) -> Array:
    """The array as unsigned integers: NaNs and signed zeros count."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def compare(device: dict[str, Array], emulator: dict[str, Array]) -> dict[str, Any]:
    """Two answers to one case: equal, how many values, how many differ, the first few differences."""
    values = differing = 0
    first: list[dict[str, Any]] = []
    for name, got in device.items():
        want = emulator[name]
        values += got.size
        if got.shape != want.shape or got.dtype != want.dtype:
            first.append({"output": name, "device": str(got.shape), "emulator": str(want.shape)})
            differing += got.size
            continue
        places = np.argwhere(bits(got) != bits(want))
        differing += len(places)
        for place in places[: max(0, FIRST - len(first))]:
            at = tuple(place)
            first.append(
                {
                    "output": name,
                    "index": [int(i) for i in place],
                    "device": _show(got[at]),
                    "emulator": _show(want[at]),
                }
            )
    return {"values": values, "equal": differing == 0, "differing": differing, "first": first}


def _show(value: Any) -> str:
    raw = int(np.asarray(value).view(np.dtype(f"u{value.dtype.itemsize}")))
    text = f"0x{raw:0{2 * value.dtype.itemsize}x}"
    return f"{text} ({float(value)!r})" if value.dtype.kind == "f" else text


# ---- golden vectors ---------------------------------------------------------------------------------------------


def golden_path(folder: Path, probe: str) -> Path:
    """tests/golden/<probe>.npz"""
    return folder / f"{probe}.npz"


def write_golden(
    path: Path, answers: dict[str, dict[str, Array]], digests: dict[str, str], origin: dict[str, Any]
) -> None:
    """Keep a device's answers. Plain arrays only (read back with allow_pickle=False)."""
    meta = {"schema": GOLDEN_SCHEMA, "origin": origin, "digests": digests}
    arrays: dict[str, Any] = {
        "meta": np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
    }
    for case, outputs in answers.items():
        for name, array in outputs.items():
            arrays[f"{case}/{name}"] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def read_golden(path: Path) -> tuple[dict[str, dict[str, Array]], dict[str, str], dict[str, Any]]:
    """Answers by case, input digests by case, and where they were recorded."""
    answers: dict[str, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(bytes(file["meta"]).decode())
        if meta.get("schema") != GOLDEN_SCHEMA:
            raise ValueError(f"{path.name}: schema must be {GOLDEN_SCHEMA}, is {meta.get('schema')!r}")
        for key in file.files:
            if key != "meta":
                case, name = key.rsplit("/", 1)
                answers.setdefault(case, {})[name] = file[key]
    return answers, meta["digests"], meta["origin"]


def prove(probe: str, golden: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Device and emulator on every case; the device's answers become the golden vectors."""
    device = library(probe, "cuda")
    try:
        emulator: Library | None = library(probe, "emulated")
    except BuildError as error:  # silicon's answers are worth keeping all the same
        print(error)
        emulator = None
    reports: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Array]] = {}
    digests: dict[str, str] = {}
    for case in cases(probe):
        answers[case.name] = device.run(case)
        digests[case.name] = case.digest()
        try:
            if emulator is None:
                raise ProbeError("the emulator's build of the probe failed")
            predicted = emulator.run(case)
        except ProbeError as error:
            reports.append(
                {
                    "name": case.name,
                    "values": 0,
                    "equal": False,
                    "differing": 0,
                    "first": [],
                    "error": str(error)[:500],
                }
            )
            continue
        report = {"name": case.name, **compare(answers[case.name], predicted)}
        if case.expected:
            known = {name: answers[case.name][name] for name in case.expected}
            report["as_specified"] = compare(known, case.expected)["equal"]
        reports.append(report)
    path = golden_path(golden, probe)
    write_golden(path, answers, digests, origin)
    wrong = [report["name"] for report in reports if not report["equal"]]
    return {
        "verdict": "differs" if wrong else "equal",
        "cases": reports,
        "golden": path.name,
        "golden_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "summary": f"differs in {len(wrong)} of {len(reports)} cases: {', '.join(wrong[:4])}"
        if wrong
        else f"{len(reports)} cases equal",
    }
