"""Ask real hardware: one command, offline, bounded in minutes, resumable.

    python -m bench.prove [--minutes M] [--family F] [--resume] [--out DIR] [--dry-run] [--commit SHA]
    python -m bench.prove --page [--out DIR]

On a Hopper machine: builds what is missing, asks silicon what the emulator assumes (probes), runs the tests marked
`gpu`, and measures the kernels beside their baselines. Every step runs in a process with a deadline; results go to
bench/ledger/<date>-<device>-<source>.json after every step, device answers to tests/golden/, and docs/hardware.md is
written anew. Steps that do not fit the minutes are left out and said so; `--resume` goes on with what is missing for
the same source and device. docs/how-to-prove.md tells the rest.

Exit status: 0 every step that ran did well, or there is no Hopper GPU (then nothing runs and no file changes);
1 a step failed, hung, or hardware disagrees; 2 wrong arguments; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .proof import ledger as ledgers
from .proof.device import Device
from .proof.families import all_steps
from .proof.page import render
from .proof.plan import select, simulate
from .proof.revision import ROOT, current
from .proof.runner import Places, Run, outcome, summary
from .proof.steps import Step


def main(
    arguments: list[str] | None = None, device: Device | None = None, steps: list[Step] | None = None
) -> int:
    """The command; `device` and `steps` are for tests. Returns the exit status."""
    options = _parse(arguments)
    device = device or Device()
    try:
        steps = select(all_steps() if steps is None else steps, options.family)
    except ValueError as error:
        print(f"bench.prove: {error}", file=sys.stderr)
        return 2
    places = Places(options.out)
    if options.page:
        return write_page(places)
    reason = device.absent_reason()
    if reason:
        fits = [step.name for step, left_out in simulate(steps, options.minutes * 60) if left_out is None]
        print(
            f"No Hopper GPU here ({reason}): nothing was run or written. On one, {options.minutes:g} minutes would run "
            f"{len(fits)} of {len(steps)} steps: {', '.join(fits)}."
        )
        return 0
    if options.dry_run:
        for step, left_out in simulate(steps, options.minutes * 60):
            print(
                f"{step.name:26} {step.estimate_s:4.0f} s  {'LEFT OUT: ' + left_out if left_out else step.what}"
            )
        return 0
    info = device.info()
    if info is None:
        print("bench.prove: the GPU stopped answering", file=sys.stderr)
        return 1
    run = Run(
        device, info, current(options.commit), places, options.minutes, options.family, options.resume,
        say=lambda text: print(text, flush=True),
    )  # fmt: skip
    try:
        ledger = run.go(steps)
    except KeyboardInterrupt:
        print("\ninterrupted; what is done is in the ledger, and --resume goes on")
        write_page(places)
        return 130
    print_table(ledger)
    print(f"\nledger: {run.path}")
    write_page(places)
    bad = {"failed", "timeout", "differs"}
    return 1 if any(outcome(step) in bad for step in ledger["steps"]) else 0


def print_table(ledger: dict) -> None:
    """One line a step."""
    print(f"\n{ledger['device']['name']}, driver {ledger['device']['driver']}")
    for step in ledger["steps"]:
        text = step["reason"] or summary(step).strip()
        print(f"{step['name']:26} {outcome(step):8} {step['seconds']:7.1f} s  {text[:140]}")


def write_page(places: Places) -> int:
    """docs/hardware.md from the ledger; 1 when a file in the folder is no ledger."""
    folder = places.ledger
    good, bad = ledgers.read_all(folder)
    if places.out.resolve() != ROOT:  # a run elsewhere: the repository's own ledgers belong to the page, too
        kept, also_bad = ledgers.read_all(ROOT / "bench" / "ledger")
        names = {name for name, _ in good}
        good = sorted(
            [*good, *[entry for entry in kept if entry[0] not in names]], key=lambda e: (e[1]["began"], e[0])
        )
        bad += also_bad
    places.page.parent.mkdir(parents=True, exist_ok=True)
    places.page.write_text(render(good, bad))
    for problem in bad:
        print(f"not a ledger: {problem}", file=sys.stderr)
    print(f"page: {places.page} ({len(good)} ledger file(s))")
    return 1 if bad else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prove", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=30, help="stop after this long (default 30)")
    parser.add_argument("--family", help="only this family: ground (what emulation assumes), gemm, ...")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an earlier run of this source and device"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT,
        help="folder for results, laid out like the repository (default: it)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--commit", help="the commit of a copy that has no .git")
    parser.add_argument(
        "--page", action="store_true", help="only write docs/hardware.md from the ledger files"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes: must be positive and at most 1440; got {options.minutes:g}")
    return options


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # a step in flight ends with us
    sys.exit(main())
