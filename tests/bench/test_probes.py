"""Probes: their cases, their builds, the emulator's answers against the specification, golden vectors replayed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.proof import builds, probes
from bench.proof import probe_convert as convert
from bench.proof import probe_wgmma as wgmma
from bench.proof.families.ground import PROBES
from bench.proof.probes import Case
from bench.proof.revision import ROOT

GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(PROBES)


# ---- cases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_the_same_every_time(name: str) -> None:
    first, second = probes.cases(name), probes.cases(name)
    assert [case.name for case in first] == [case.name for case in second]
    assert [case.digest() for case in first] == [case.digest() for case in second]
    for case in first:
        assert set(case.expected) <= set(case.outputs), case.name
        for key, array in case.expected.items():
            assert (array.shape, array.dtype) == (case.outputs[key].shape, case.outputs[key].dtype), (
                case.name,
                key,
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_stays_small(name: str) -> None:
    """Vectors are committed: what a probe asks for must be worth it."""
    assert sum(array.nbytes for case in probes.cases(name) for array in case.outputs.values()) <= 3 << 20


def test_digest_sees_parameters_inputs_and_initial_outputs() -> None:
    case = probes.cases("matrix_moves")[0]
    other = [
        dataclasses.replace(case, parameters=(*case.parameters[:-1], 9)),
        dataclasses.replace(case, inputs=(case.inputs[0] + 1, *case.inputs[1:])),
        dataclasses.replace(case, outputs={"out": case.outputs["out"] + 1}),
    ]
    assert len({case.digest(), *(c.digest() for c in other)}) == 4


def simulate_wgmma(case: Case) -> np.ndarray:
    """D of a wgmma case in float64, with the operands read back from the images by the address rules of the PTX ISA.

    Third writing of those rules, by bits of the address instead of by spans: it keeps probe_wgmma.Layout honest.
    """
    form, n, registers, tiles, steps = *case.parameters[:3], case.parameters[13], case.parameters[14]
    size, k = wgmma.SIZE[form], wgmma.STEP[form]

    def element(
        image: np.ndarray, rows: int, major: int, swizzle: int, lbo: int, sbo: int, start: int
    ) -> np.ndarray:
        r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
        along, across = (c * size, r) if major == wgmma.K_MAJOR else (r * size, c)
        if swizzle == 0:
            if major == wgmma.K_MAJOR:
                address = across % 8 * 16 + across // 8 * sbo + along // 16 * lbo + along % 16
            else:
                address = across % 8 * 16 + across // 8 * lbo + along // 16 * sbo + along % 16
        else:
            span = 16 << swizzle
            address = across % 8 * span + across // 8 * sbo + along // span * lbo + along % span
        address = address + start
        mask = (1 << swizzle) - 1
        address ^= (address >> 7 & mask) << 4
        return sum(image[address + byte].astype(np.uint32) << 8 * byte for byte in range(size))

    result = []
    for tile in range(tiles):
        total = case.inputs[2][tile].astype(np.float64) if case.parameters[15] else np.zeros((128, n // 2))
        total = wgmma.scatter(total)
        for step in range(steps):
            if registers:
                a = np.zeros((64, k), np.uint32)
                a[wgmma.a_register_index(form)] = case.inputs[0][tile, step]
            else:
                _, _, _, major, swizzle, lbo, sbo, advance = case.parameters[:8]
                a = element(case.inputs[0][tile], 64, major, swizzle, lbo, sbo, step * advance)
            major, swizzle, lbo, sbo, advance = case.parameters[8:13]
            b = element(case.inputs[1][tile], n, major, swizzle, lbo, sbo, step * advance)
            total = total + wgmma.decode(a, form) @ wgmma.decode(b, form).T
        result.append(wgmma.gather(total))
    return np.stack(result)


@pytest.mark.parametrize("name", ["fragments", "operands"])
def test_images_hold_what_the_address_rules_read(name: str) -> None:
    for case in probes.cases(name):
        assert np.array_equal(simulate_wgmma(case), case.expected["d"].astype(np.float64)), case.name


def test_fragment_maps_cover_every_element_once() -> None:
    for n in wgmma.FRAGMENT_N:
        row, column = wgmma.accumulator_index(n)
        assert len(set(zip(row.ravel().tolist(), column.ravel().tolist(), strict=True))) == 64 * n
    for form in range(4):
        row, k = wgmma.a_register_index(form)
        assert len(set(zip(row.ravel().tolist(), k.ravel().tolist(), strict=True))) == 64 * wgmma.STEP[form]


NEIGHBOURS = [{"fraction_bits": -1}, {"fraction_bits": 1}, {"mantissa_bits": -1}]


@pytest.mark.parametrize(
    ("form", "change"),
    # Products of bf16 subnormals lie below every fp32 number: their exponent cannot show.
    [(form, change) for form in (wgmma.E4M3, wgmma.BF16) for change in NEIGHBOURS]
    + [(wgmma.E4M3, {"min_exponent": 1})],
)
def test_numerics_cases_tell_models_apart(
    form: int, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If silicon kept one bit more or less than the model, the probe would show it."""
    import torch

    from deepseek_ops.reference import tensor_core

    dtype = torch.float8_e4m3fn if form == wgmma.E4M3 else torch.bfloat16
    cases = [case for case in probes.cases("numerics") if case.parameters[0] == form]
    was = tensor_core.FORMATS[dtype]
    other = dataclasses.replace(was, **{name: getattr(was, name) + by for name, by in change.items()})
    monkeypatch.setitem(tensor_core.FORMATS, dtype, other)
    changed = {case.name: case.expected for case in probes.cases("numerics") if case.parameters[0] == form}
    assert any(not probes.compare(case.expected, changed[case.name])["equal"] for case in cases)


def test_decode_tables_against_torch() -> None:
    import torch

    for form, dtype in ((wgmma.E4M3, torch.float8_e4m3fn), (wgmma.E5M2, torch.float8_e5m2)):
        want = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
        assert np.array_equal(wgmma.decode_table(form), want, equal_nan=True)


def test_rounding_of_conversions_against_torch() -> None:
    """Torch does not saturate as cvt.satfinite does, so compare inside the range and look at the ends apart."""
    import torch

    patterns = convert.boundary_patterns()
    values = patterns.view(np.float32)
    inside = np.abs(values) <= 448
    want = torch.from_numpy(values[inside].copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    got = convert.round_to_table(patterns, wgmma.decode_table(wgmma.E4M3), 448.0)
    assert np.array_equal(got[inside], want)
    assert set(got[values > 448].tolist()) == {0x7E} and set(got[values < -448].tolist()) == {0xFE}
    assert set(got[np.isnan(values)].tolist()) == {0x7F}
    finite = ~np.isnan(values)
    want = (
        torch.from_numpy(values[finite].copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    assert np.array_equal(convert.round_to_bf16(patterns)[finite], want)


# ---- comparison and golden files -----------------------------------------------------------------------------------


def test_comparison_is_by_bits() -> None:
    x = {"d": np.array([0.0, np.nan, 1.0, 2.0], np.float32)}
    assert probes.compare(x, {"d": x["d"].copy()}) == {
        "values": 4,
        "equal": True,
        "differing": 0,
        "first": [],
    }
    y = {"d": np.array([-0.0, np.nan, 1.0, 2.0], np.float32)}
    report = probes.compare(x, y)
    assert report["differing"] == 1
    assert report["first"] == [
        {"output": "d", "index": [0], "device": "0x00000000 (0.0)", "emulator": "0x80000000 (-0.0)"}
    ]
    assert not probes.compare(x, {"d": x["d"][:2]})["equal"]
    many = {"d": np.arange(100, dtype=np.uint8)}
    report = probes.compare(many, {"d": many["d"] + 1})
    assert report["differing"] == 100 and len(report["first"]) == probes.FIRST


def test_golden_round_trip(tmp_path: Path) -> None:
    answers = {
        "a-case": {"d": np.array([[np.nan, -0.0]], np.float32)},
        "b": {"x": np.arange(3, dtype=np.uint8)},
    }
    path = probes.golden_path(tmp_path, "p")
    probes.write_golden(path, answers, {"a-case": "1", "b": "2"}, {"device": "x"})
    got, digests, origin = probes.read_golden(path)
    assert digests == {"a-case": "1", "b": "2"} and origin == {"device": "x"}
    for case, outputs in answers.items():
        assert probes.compare(got[case], outputs)["equal"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


class FakeLibrary:
    """Answers with what is specified, or with something else for one case."""

    def __init__(self, wrong: str = "", broken: str = "") -> None:
        self.wrong, self.broken = wrong, broken

    def run(self, case: Case) -> dict[str, np.ndarray]:
        if case.name == self.broken:
            raise probes.ProbeError("race at x.cu:7")
        answer = {name: case.expected.get(name, array).copy() for name, array in case.outputs.items()}
        if case.name == self.wrong:
            next(iter(answer.values())).flat[5] += 1
        return answer


@pytest.mark.parametrize(
    ("emulator", "verdict", "bad"),
    [
        (FakeLibrary(), "equal", []),
        (FakeLibrary(wrong="ldmatrix-x2"), "differs", ["ldmatrix-x2"]),
        (FakeLibrary(broken="stmatrix-x4"), "differs", ["stmatrix-x4"]),
    ],
)
def test_verdict_of_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulator: FakeLibrary, verdict: str, bad: list[str]
) -> None:
    libraries = {"cuda": FakeLibrary(), "emulated": emulator}
    monkeypatch.setattr(probes, "library", lambda probe, target: libraries[target])
    data = probes.prove("matrix_moves", tmp_path, {"device": "x"})
    assert data["verdict"] == verdict
    assert [case["name"] for case in data["cases"] if not case["equal"]] == bad
    assert all(case.get("as_specified", True) for case in data["cases"])
    answers, digests, _ = probes.read_golden(tmp_path / "matrix_moves.npz")
    assert set(answers) == set(digests) == {case.name for case in probes.cases("matrix_moves")}


def test_device_answers_are_kept_when_the_emulator_does_not_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(probe: str, target: str) -> FakeLibrary:
        if target == "emulated":
            raise builds.BuildError("g++ says no")
        return FakeLibrary()

    monkeypatch.setattr(probes, "library", library)
    data = probes.prove("matrix_moves", tmp_path, {})
    assert data["verdict"] == "differs" and (tmp_path / "matrix_moves.npz").exists()


# ---- builds --------------------------------------------------------------------------------------------------------


def test_every_probe_has_its_source() -> None:
    assert {source for *_, source in PROBES.values()} | {"micro.cu"} == set(builds.sources())


def test_missing_compilers_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "nvcc", lambda: None)
    monkeypatch.setattr(builds, "host_compiler", lambda: None)
    with pytest.raises(builds.BuildError, match="nvcc not found"):
        builds.build("tma.cu", "cuda")
    with pytest.raises(builds.BuildError, match=r"no C\+\+ compiler found"):
        builds.build("tma.cu", "emulated")
    problems = builds.build_all(["tma.cu"])
    assert set(problems) == {"tma.cu:cuda", "tma.cu:emulated"} and all(problems.values())


needs_nvcc = pytest.mark.skipif(builds.nvcc() is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(builds.host_compiler() is None, reason="no C++ compiler")


@needs_nvcc
@pytest.mark.parametrize("source", builds.sources())
def test_probe_compiles_for_sm_90a(source: str) -> None:
    log = builds.build(source, "cuda").with_suffix(".log").read_text()
    assert "serialized" not in log, "ptxas serialises wgmma"  # only an 'info' for ptxas (C7510, C7514)
    assert "bytes spill" not in log.replace("0 bytes spill stores, 0 bytes spill loads", "")
    assert "sm_90a" in log


@needs_compiler
@pytest.mark.parametrize("target", ["emulated", "checked"])
@pytest.mark.parametrize("name", NAMES)
def test_emulator_answers_as_specified(name: str, target: str) -> None:
    """`checked` besides proves that a probe asks no undefined question: a hazard would be an error."""
    library = probes.library(name, target)
    for case in probes.cases(name):
        got = library.run(case)
        report = probes.compare({key: got[key] for key in case.expected}, case.expected)
        assert report["equal"], (case.name, report["differing"], report["first"][:3])


@needs_compiler
@pytest.mark.parametrize("variant", range(8))
def test_micro_benchmarks_run_in_the_emulator(variant: int) -> None:
    from bench.proof.micro import one

    assert one(probes.Library(builds.build("micro.cu", "emulated")), variant, 2, 5, 2, 1) == 0.0


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_emulator_equals_golden(name: str) -> None:
    """What silicon said is what the emulator says. See tests/golden/README.md when this fails."""
    path = probes.golden_path(GOLDEN, name)
    if not path.exists():
        pytest.skip(f"needs a Hopper GPU once: bench.prove records golden vectors of {name} on it")
    answers, digests, origin = probes.read_golden(path)
    library = probes.library(name, "emulated")
    stale = []
    for case in probes.cases(name):
        if digests.get(case.name) != case.digest():
            stale.append(case.name)  # the case changed since: silicon has not been asked yet
            continue
        report = probes.compare(answers[case.name], library.run(case))
        assert report["equal"], (case.name, origin, report["first"])
    assert len(stale) < len(digests), f"every golden vector of {name} is stale: record them again"
