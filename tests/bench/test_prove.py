"""The logic of bench.prove with a device that does not exist: plan, budget, resume, failures, ledger, page."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from bench import prove
from bench.proof import ledger as ledgers
from bench.proof import page
from bench.proof.claims import nominal_bandwidth, probe_agrees
from bench.proof.device import Device
from bench.proof.families import all_claims, all_steps
from bench.proof.families.ground import PROBES
from bench.proof.gpu_tests import read_junit
from bench.proof.journal import Journal
from bench.proof.measure import ClockLog, percentile, summarise
from bench.proof.plan import Budget, order, select, simulate
from bench.proof.revision import ROOT, current, tree_digest
from bench.proof.steps import Step

from .fake_device import INFO, FakeDevice, Script


def step(name: str, priority: int = 1, estimate: float = 10, deadline: float = 60, needs: tuple[str, ...] = (),
         kind: str = "probe", family: str = "ground") -> Step:  # fmt: skip
    return Step(
        name, kind, priority, estimate, deadline, f"what {name} settles", lambda golden: {}, needs, family
    )


STEPS = [
    step("environment", 0, kind="environment"),
    step("a"),
    step("b"),
    step("late", 3, kind="benchmark", family="gemm"),
]


def run(
    tmp_path: Path, device: FakeDevice, *arguments: str, steps: list[Step] | None = None
) -> tuple[int, dict]:
    status = prove.main(["--out", str(tmp_path), *arguments], device, STEPS if steps is None else steps)
    files = sorted((tmp_path / "bench" / "ledger").glob("*.json"))
    return status, ledgers.read(files[-1]) if files else {}


def statuses(ledger: dict) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in ledger["steps"]}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_steps_are_well_formed() -> None:
    steps = all_steps()
    names = [s.name for s in steps]
    assert len(set(names)) == len(names)
    assert all(need in names for s in steps for need in s.needs)
    assert all(0 < s.estimate_s <= s.deadline_s <= 600 for s in steps)
    assert all(s.kind in ledgers.KINDS for s in steps)
    by_name = {s.name: s for s in steps}
    assert all(by_name[need].priority <= s.priority for s in steps for need in s.needs)


def test_default_budget_fits_every_step() -> None:
    assert all(reason is None for _, reason in simulate(all_steps(), 30 * 60))


def test_the_documented_estimate() -> None:
    minutes = sum(s.estimate_s for s in all_steps()) / 60
    (said,) = re.findall(r"about (\d+) minutes by estimate", (ROOT / "docs" / "how-to-prove.md").read_text())
    assert abs(minutes - int(said)) < 1, f"docs/how-to-prove.md: about {minutes:.0f} minutes"


def test_nine_minutes_keep_all_probes_and_the_headline() -> None:
    """A lent machine gives ten minutes a command: what emulation assumes comes first."""
    fits = {s.name for s, reason in simulate(all_steps(), 9 * 60) if reason is None}
    assert {f"probe-{name}" for name in PROBES} | {"vendor-partials"} <= fits


def families() -> str:
    return ", ".join(["ground", *sorted({step.family for step in all_steps()} - {"ground"})])


def test_select_family_takes_what_it_needs() -> None:
    names = {s.name for s in select(all_steps(), "quantize")}
    assert names == {"environment", "build", "build-probes", "tests", "bench-quantize"}
    assert all(f"bench-{f}" in {s.name for s in select(all_steps(), f)} for f in ("norm", "moe", "bf16_gemm"))
    assert {s.family for s in select(all_steps(), "ground")} == {"ground"}
    with pytest.raises(ValueError, match=rf"--family: must be one of {families()}; got 'gem'"):
        select(all_steps(), "gem")


def test_order_puts_failures_last() -> None:
    assert [s.name for s in order(STEPS, {"environment"})] == ["a", "b", "late", "environment"]


def test_budget() -> None:
    now = 0.0
    budget = Budget(lambda: now, 100, reserve_s=5)
    assert budget.refusal(step("x", estimate=95)) is None
    now = 50.0
    assert budget.refusal(step("x", estimate=46)) == "does not fit: needs about 46 s, 45 s are left"
    assert budget.deadline(step("x", deadline=60)) == 45
    assert budget.deadline(step("x", deadline=20)) == 20


def test_simulate_leaves_out_dependents() -> None:
    steps = [step("big", estimate=1000), step("child", needs=("big",)), step("small")]
    plan = {s.name: reason for s, reason in simulate(steps, 100)}
    assert plan["small"] is None
    assert plan["child"] == "needs big, which is left out"


# ---- running -------------------------------------------------------------------------------------------------------


def test_no_gpu_says_so_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keep").write_text("x")
    before = snapshot(tmp_path)
    device = FakeDevice(info=None)
    assert run(tmp_path, device)[0] == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "No Hopper GPU here (no NVIDIA driver (nvidia-smi is not on the PATH)): nothing was run"
    )
    assert out.count("\n") == 1 and "4 of 4 steps: environment, a, b, late" in out
    assert snapshot(tmp_path) == before and device.calls == []


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = FakeDevice()
    assert run(tmp_path, device, "--dry-run", "--minutes", "0.5")[0] == 0
    out = capsys.readouterr().out
    assert "what a settles" in out and "LEFT OUT: does not fit" in out
    assert snapshot(tmp_path) == {} and device.calls == []


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = FakeDevice()
    status, ledger = run(tmp_path, device)
    assert status == 0
    assert device.steps() == ["environment", "a", "b", "late"]
    assert set(statuses(ledger).values()) == {"ok"}
    assert ledger["device"] == INFO.to_json() and ledger["revision"]["tree"] == tree_digest()
    assert ledger["steps"][1]["clocks"] == [device.clocks()] * 2
    (file,) = (tmp_path / "bench" / "ledger").iterdir()
    assert file.name.startswith("2026-11-24-nvidia-h100-80gb-hbm3-")
    assert (tmp_path / "docs" / "hardware.md").read_text().startswith("<!-- Generated")
    out = capsys.readouterr().out
    assert "environment                ok" in out and "fine" in out


def test_budget_skips_and_says_so(tmp_path: Path) -> None:
    steps = [step("long", estimate=100), step("short", estimate=10), step("child", needs=("long",))]
    status, ledger = run(tmp_path, FakeDevice(), "--minutes", "1", steps=steps)
    assert status == 0  # what ran did well
    by_name = {entry["name"]: entry for entry in ledger["steps"]}
    assert by_name["long"]["status"] == "skipped"
    assert by_name["long"]["reason"] == "does not fit: needs about 100 s, 55 s are left"
    assert by_name["child"]["reason"] == "needs long, which did not end well"
    assert by_name["short"]["status"] == "ok"


def test_total_time_is_bounded_by_the_minutes(tmp_path: Path) -> None:
    device = FakeDevice({name: Script(hangs=True) for name in "abc"})
    run(tmp_path, device, "--minutes", "2", steps=[step(name, estimate=10, deadline=500) for name in "abc"])
    assert device.seconds <= 120


def test_a_hang_is_killed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = FakeDevice({"a": Script(hangs=True, output="waiting for mbarrier\n")})
    status, ledger = run(tmp_path, device)
    assert status == 1
    entry = ledger["steps"][1]
    assert (entry["status"], entry["reason"]) == ("timeout", "killed at its deadline of 60 s")
    assert entry["log"] == "waiting for mbarrier\n"
    assert statuses(ledger)["b"] == "ok"
    assert [name for name, _ in device.calls] == ["environment", "a", "ping", "b", "late"]
    assert "timeout a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(returncode=3, output="Traceback\n  ...\nRuntimeError: misaligned address\n"),
         "exit status 3: RuntimeError: misaligned address"),
        (Script(data=None), "the step wrote no result (FileNotFoundError)"),
        (Script(raw="{"), "the step wrote no result (JSONDecodeError)"),
        (Script(data=[1]), "the step's result is no object"),
    ],
)  # fmt: skip
def test_failures_do_not_stop_the_rest(tmp_path: Path, script: Script, reason: str) -> None:
    status, ledger = run(tmp_path, FakeDevice({"a": script}))
    assert status == 1
    assert ledger["steps"][1]["status"] == "failed" and ledger["steps"][1]["reason"] == reason
    assert statuses(ledger)["late"] == "ok"


def test_a_dead_device_ends_the_run(tmp_path: Path) -> None:
    device = FakeDevice({"a": Script(hangs=True), "ping": Script(hangs=True)})
    status, ledger = run(tmp_path, device)
    assert status == 1
    assert statuses(ledger) == {"environment": "ok", "a": "timeout", "b": "skipped", "late": "skipped"}
    assert ledger["steps"][2]["reason"] == "the device stopped answering"


def test_disagreement_of_hardware_is_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, ledger = run(
        tmp_path, FakeDevice({"a": Script(data={"verdict": "differs", "summary": "differs in 1"})})
    )
    assert status == 1 and statuses(ledger)["a"] == "ok"
    assert "differs in 1" in capsys.readouterr().out


def test_not_a_number_is_null_in_the_ledger(tmp_path: Path) -> None:
    _, ledger = run(tmp_path, FakeDevice({"a": Script(raw='{"x": NaN, "y": [Infinity, 1]}')}))
    assert ledger["steps"][1]["data"] == {"x": None, "y": [None, 1]}


# ---- resume --------------------------------------------------------------------------------------------------------


def test_resume_after_a_kill(tmp_path: Path) -> None:
    """The run dies in the middle of step b; the next one starts with what was never tried, then tries b again."""

    def die() -> None:
        raise KeyboardInterrupt

    assert run(tmp_path, FakeDevice({"b": Script(action=die)}))[0] == 130
    (file,) = (tmp_path / "bench" / "ledger").iterdir()
    assert statuses(ledgers.read(file)) == {"environment": "ok", "a": "ok"}  # written after every step
    again = FakeDevice()
    status, ledger = run(tmp_path, again, "--resume")
    assert status == 0 and again.steps() == ["late", "b"]
    assert set(statuses(ledger).values()) == {"ok"} and len(ledger["steps"]) == 4
    assert [p.name for p in (tmp_path / "bench" / "ledger").iterdir()] == [file.name]


def test_resume_takes_skipped_steps_and_retries_failures_last(tmp_path: Path) -> None:
    run(tmp_path, FakeDevice({"a": Script(hangs=True, seconds=1)}), "--minutes", "1.6")
    again = FakeDevice()
    status, ledger = run(tmp_path, again, "--resume")
    assert status == 0 and again.steps()[-1] == "a" and "environment" not in again.steps()
    assert set(statuses(ledger).values()) == {"ok"}


def test_a_failure_that_is_not_retried_stays_on_record(tmp_path: Path) -> None:
    run(tmp_path, FakeDevice({"a": Script(hangs=True)}))
    status, ledger = run(tmp_path, FakeDevice(), "--resume", "--minutes", "0.1")
    assert statuses(ledger)["a"] == "timeout" and status == 1


def test_resume_of_nothing_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, ledger = run(tmp_path, FakeDevice(), "--resume")
    assert "nothing to resume" in capsys.readouterr().out and len(ledger["steps"]) == 4


def test_another_device_or_source_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, FakeDevice())
    other = FakeDevice(info=type(INFO)("NVIDIA H200", "580", 143771, "9.0"))
    run(tmp_path, other, "--resume")
    assert len(other.steps()) == 4
    monkeypatch.setattr(prove, "current", lambda commit: type(current())("", False, "0123456789ab"))
    changed = FakeDevice()
    run(tmp_path, changed, "--resume")
    assert len(changed.steps()) == 4
    assert len(list((tmp_path / "bench" / "ledger").iterdir())) == 3


def test_without_resume_a_second_run_gets_its_own_file(tmp_path: Path) -> None:
    run(tmp_path, FakeDevice())
    second = FakeDevice()
    run(tmp_path, second)
    assert len(second.steps()) == 4
    names = sorted(p.name for p in (tmp_path / "bench" / "ledger").iterdir())
    assert len(names) == 2 and any(name.endswith("-2.json") for name in names)


@pytest.mark.parametrize(
    "line", ['{"key": ', "[]", '"text"', '{"key": "k"}', '{"event": "finished", "key": "%s"}', "\0\xff"]
)
def test_corrupt_journal_lines_are_ignored(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, FakeDevice())
    journal = tmp_path / "build" / "prove" / "journal.jsonl"
    key = json.loads(journal.read_text().splitlines()[0])["key"]
    lines = journal.read_text().splitlines()
    lines.insert(2, line.replace("%s", key))
    journal.write_text("\n".join(lines) + '\n{"torn')
    again = FakeDevice()
    status, _ = run(tmp_path, again, "--resume")
    assert status == 0 and again.steps() == []
    assert "unreadable line(s) ignored" in capsys.readouterr().out
    Journal.read(journal, key).started("x")  # appends after the torn line, not to it
    assert json.loads(journal.read_text().splitlines()[-1])["step"] == "x"


def test_the_journal_alone_is_enough_to_resume(tmp_path: Path) -> None:
    """A lent machine is bare: only the journal may have come back, or the ledger may be damaged."""
    run(tmp_path, FakeDevice())
    (file,) = (tmp_path / "bench" / "ledger").iterdir()
    for damage in (lambda: file.write_text("{"), file.unlink):
        damage()
        again = FakeDevice()
        status, ledger = run(tmp_path, again, "--resume")
        assert status == 0 and again.steps() == [] and len(ledger["steps"]) == 4


# ---- ledger --------------------------------------------------------------------------------------------------------


def sample(**changes: object) -> dict:
    entry = {
        "name": "a", "kind": "probe", "family": "ground", "status": "ok", "reason": "", "began": "2026-11-24T10:00:00Z",
        "seconds": 1.5, "clocks": [], "data": {}, "log": "",
    }  # fmt: skip
    ledger = {
        "schema": 1, "began": "2026-11-24T10:00:00Z", "ended": "2026-11-24T10:01:00Z", "budget_minutes": 30,
        "family": None, "revision": {"commit": "c" * 40, "dirty": False, "tree": "0" * 12}, "device": INFO.to_json(),
        "steps": [entry],
    }  # fmt: skip
    ledger.update(changes)
    return ledger


def with_step(**changes: object) -> dict:
    ledger = sample()
    ledger["steps"][0].update(changes)
    return ledger


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "x.json: must be an object, is list"),
        (sample(schema=2), "x.json.schema: must be 1, is 2"),
        ({}, "x.json.schema: must be 1, is None"),
        ({k: v for k, v in sample().items() if k != "device"}, "x.json.device: is missing"),
        (sample(budget_minutes=True), "x.json.budget_minutes: has the type bool"),
        (sample(extra=1), "x.json.extra: is not a field of schema 1"),
        (sample(revision={"commit": "", "dirty": 0, "tree": ""}), "x.json.revision.dirty: has the type int"),
        (
            with_step(status="great"),
            "x.json.steps[0].status: must be one of ok, failed, timeout, skipped, is 'great'",
        ),
        (with_step(kind="poem"), "x.json.steps[0].kind: must be one of"),
        (sample(steps=sample()["steps"] * 2), "x.json.steps[1].name: 'a' appears twice"),
        (sample(steps=[None]), "x.json.steps[0]: must be an object, is NoneType"),
    ],
)
def test_ledger_is_validated_on_read(tmp_path: Path, value: object, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(value))
    with pytest.raises(ledgers.LedgerError) as caught:
        ledgers.read(file)
    assert str(caught.value).startswith(message)


def test_ledger_round_trip_and_atomic_write(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    ledgers.write(file, sample())
    assert ledgers.read(file) == sample()
    with pytest.raises(ledgers.LedgerError):
        ledgers.write(file, sample(schema=9))
    assert ledgers.read(file) == sample() and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_committed_ledgers_are_valid() -> None:
    _, bad = ledgers.read_all(ROOT / "bench" / "ledger")
    assert bad == []


# ---- claims and the page -------------------------------------------------------------------------------------------


def row(ours: dict, theirs: dict, kernel: str = "fp8_gemm", **more: object) -> dict:
    return {"kernel": kernel, "shape": "s", "candidates": {"ours": ours, "cublaslt": theirs}, **more}


def judge(name: str, data: dict) -> tuple[bool | None, str]:
    return next(claim for claim in all_claims() if claim.name == name).judge(data)


def test_judges() -> None:
    fast, slow = {"median_us": 10.0, "correct": True}, {"median_us": 20.0}
    assert judge("fp8_gemm.speed.large", {"rows": [row(fast, slow)]}) == (True, "at least 2.000x (s)")
    assert (
        judge("fp8_gemm.speed.large", {"rows": [row(fast, slow), row({**slow, "correct": True}, fast)]})[0]
        is False
    )
    assert judge("fp8_gemm.speed.large", {"rows": [row({**fast, "correct": False}, slow)]}) == (
        False,
        "s: ours is wrong",
    )
    assert judge("fp8_gemm.speed.large", {"rows": [row({"absent": "no kernel"}, slow)]}) == (
        None,
        "s: no kernel",
    )
    assert judge("fp8_gemm.speed.large", {"rows": [row(fast, {**slow, "correct": False})]})[0] is None
    assert judge("fp8_gemm.accuracy", {"rows": [row({"rel_rms": 2e-4}, {})]})[0] is True
    assert judge("fp8_gemm.accuracy", {"rows": [row({"rel_rms": 2e-3}, {})]})[0] is False
    quant = {"kernel": "quantize_1x128", "input_bytes": 64 << 20}
    for gbps, holds in ((2960.0, True), (2900.0, False)):
        rows = [
            row({"gbps": gbps, "correct": True}, {}, **quant),
            row({"gbps": 1.0}, {}, kernel="quantize_1x128", input_bytes=1),
        ]
        assert judge("quantize_1x128.speed", {"nominal_gbps": 3352, "rows": rows})[0] is holds
    assert judge("fp8_gemm.bits", {"outcomes": {"t::test_fp8_gemm_bits[1]": "passed"}}) == (True, "1 tests")
    assert judge("fp8_gemm.bits", {"outcomes": {"t::test_fp8_gemm_bits[1]": "failed"}})[0] is False
    assert judge("fp8_gemm.bits", {"outcomes": {"t::test_fp8_gemm_bits[1]": "skipped"}})[0] is None
    assert probe_agrees({"cases": [{"name": "x", "equal": False, "values": 3}]}) == (
        False,
        "1 of 1 cases differ, first x",
    )


def test_nominal_bandwidth_takes_the_most_specific_name() -> None:
    assert nominal_bandwidth("NVIDIA H100 80GB HBM3") == 3352
    assert nominal_bandwidth("NVIDIA H100 PCIe") == 2039
    assert nominal_bandwidth("NVIDIA H200") == 4800
    assert nominal_bandwidth("NVIDIA B200") is None


def probe_ledger(equal: bool, began: str, commit: str, device: str = INFO.name, status: str = "ok") -> dict:
    data = {"cases": [{"name": "swizzle", "equal": equal, "values": 8}]}
    ledger = with_step(
        name="probe-operands", data=data, status=status, reason="" if status == "ok" else "killed"
    )
    ledger.update(began=began, revision={"commit": commit * 40, "dirty": False, "tree": "0" * 12})
    ledger["device"] = {**INFO.to_json(), "name": device}
    return ledger


def operands_state(*entries: dict) -> tuple[str, list[page.Answer]]:
    claim = next(claim for claim in all_claims() if claim.name == "emulator.operands")
    results = page.answers(claim, [(f"{i}.json", entry) for i, entry in enumerate(entries)])
    return page.state(results), results


def test_newest_run_decides_per_device() -> None:
    old, new = probe_ledger(False, "2026-11-01", "a"), probe_ledger(True, "2026-11-02", "b")
    assert operands_state()[0] == "unproven"
    assert operands_state(old)[0] == "refuted"
    state, results = operands_state(old, new)
    assert state == "confirmed" and [r.revision for r in results] == ["b" * 12]
    assert operands_state(new, probe_ledger(False, "2026-11-03", "c", "NVIDIA H200"))[0] == "mixed"


def test_a_run_that_says_nothing_does_not_hide_an_older_answer() -> None:
    state, results = operands_state(
        probe_ledger(True, "1", "a"), probe_ledger(True, "2", "b", status="timeout")
    )
    assert state == "confirmed" and results[0].revision == "a" * 12
    state, results = operands_state(probe_ledger(True, "2", "b", status="timeout"))
    assert state == "unproven" and results[0].evidence == "the step ended as timeout: killed"


def test_data_of_another_shape_is_no_crash() -> None:
    ledger = with_step(name="probe-operands", data={"cases": [{"nme": 1}]})
    assert operands_state(ledger)[0] == "unproven"


def test_page_of_nothing_and_of_something() -> None:
    text = page.render([], [])
    assert "No run on hardware has been recorded yet" in text and f"{len(all_claims())} unproven" in text
    bench = with_step(
        name="bench-fp8_gemm-large", kind="benchmark",
        data={"rows": [row({"median_us": 10.0, "p10_us": 9.0, "p90_us": 12.0, "tflops": 1401.0, "correct": True,
                            "sustained": {"sm_mhz": {"median": 1410}}}, {"median_us": 11.0, "p10_us": 10.0, "p90_us": 12.0})]},
    )  # fmt: skip
    text = page.render([("x.json", probe_ledger(True, "1", "a")), ("y.json", bench)], ["z.json: is broken"])
    assert "| confirmed | 1 cases, 8 values (NVIDIA H100 80GB HBM3, aaaaaaaaaaaa, 1) |" in text
    assert (
        "| fp8_gemm | s | NVIDIA H100 80GB HBM3 | cccccccccccc | ours | 10.0 (9.0 to 12.0) | 1401 TFLOP/s | 1410 |"
        in text
    )
    assert "at least 1.100x (s)" in text and "Not counted: z.json: is broken" in text


def test_committed_page_is_current() -> None:
    good, bad = ledgers.read_all(ROOT / "bench" / "ledger")
    assert (ROOT / "docs" / "hardware.md").read_text() == page.render(good, bad), (
        "run: python -m bench.prove --page"
    )


def test_page_command_reports_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench" / "ledger"
    folder.mkdir(parents=True)
    (folder / "bad.json").write_text("{")
    assert prove.main(["--page", "--out", str(tmp_path)], FakeDevice()) == 1
    assert "not a ledger: bad.json" in capsys.readouterr().err
    assert "Not counted: bad.json" in (tmp_path / "docs" / "hardware.md").read_text()


# ---- arguments, the real device, small parts -----------------------------------------------------------------------


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove.main(["--family", "poetry"], FakeDevice()) == 2
    assert f"must be one of {families()}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        prove.main(["--minutes", "0"], FakeDevice())
    assert caught.value.code == 2


def test_a_real_process_is_killed_with_its_children(tmp_path: Path) -> None:
    """The deadline holds for what a step starts, too: an orphan would keep the GPU."""
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; print('begun', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    began = time.monotonic()
    result = Device().run_process([sys.executable, "-c", code], 1.0)
    assert result.timed_out and result.output == "begun\n" and time.monotonic() - began < 10
    time.sleep(max(0.0, 3.5 - (time.monotonic() - began)))
    assert not mark.exists()


def test_a_real_process_reports_status_and_output() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    result = Device().run_process([sys.executable, "-c", code], 30)
    assert (result.returncode, result.timed_out) == (7, False) and set(result.output.split()) == {
        "out",
        "err",
    }


def test_real_device_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    device = Device()
    assert device.info() is None and device.clocks() == {} and not device.cuda_available()
    assert device.absent_reason() == "no NVIDIA driver (nvidia-smi is not on the PATH)"


def fake_smi(folder: Path, text: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{text}'\n")
    tool.chmod(0o755)


def test_real_device_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_smi(tmp_path, "NVIDIA H200, 580.159.03, 143771, 9.0")
    assert Device().absent_reason() is None
    assert Device().info().slug == "nvidia-h200"
    fake_smi(tmp_path, "NVIDIA A100, 580.159.03, 81920, 8.0")
    assert (
        Device().absent_reason() == "NVIDIA A100 has compute capability 8.0; the kernels are for 9.0 (sm_90a)"
    )
    fake_smi(tmp_path, "345, 3201, 110.5, 700.00, 33, [N/A]")
    assert Device().clocks() == {
        "sm_mhz": 345, "memory_mhz": 3201, "power_w": 110.5, "power_limit_w": 700, "temperature_c": 33,
    }  # fmt: skip


def test_worker_does_not_know_every_step() -> None:
    result = Device().run_process([sys.executable, "-m", "bench.proof.worker", "poem"], 60, cwd=ROOT)
    assert result.returncode != 0 and "no such step: 'poem'" in result.output


def test_percentiles() -> None:
    assert (
        percentile([3.0, 1.0, 2.0], 0.5) == 2
        and percentile([1.0, 2.0], 0.5) == 1.5
        and percentile([7.0], 0.9) == 7
    )
    assert summarise([0.001 * i for i in range(1, 12)]) == {
        "median_us": 6.0, "p10_us": 2.0, "p90_us": 10.0, "min_us": 1.0, "repeats": 11,
    }  # fmt: skip


def test_clock_log() -> None:
    values = iter([{"sm_mhz": 1000.0}, {}, {"sm_mhz": 1400.0}])
    log = ClockLog(lambda: next(values, {}), interval_s=0.001)
    with log():
        time.sleep(0.1)
    assert log.summary() == {"samples": 2, "sm_mhz": {"min": 1000.0, "median": 1200.0, "max": 1400.0}}


def test_junit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="m" name="good"/><testcase classname="m" name="bad"><failure/></testcase>'
        '<testcase classname="m" name="odd"><error/></testcase><testcase classname="m" name="not"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_junit(file) == {
        "m::good": "passed",
        "m::bad": "failed",
        "m::odd": "failed",
        "m::not": "skipped",
    }


def test_tree_digest_follows_contents(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "x.cu").write_text("1")
    first = tree_digest(tmp_path)
    (tmp_path / "csrc" / "note.md").write_text("no source")
    assert tree_digest(tmp_path) == first
    (tmp_path / "csrc" / "x.cu").write_text("2")
    assert tree_digest(tmp_path) != first
    assert (
        current("abc", tmp_path).slug == "abc"
        and current(None, tmp_path).slug == f"tree-{tree_digest(tmp_path)}"
    )
