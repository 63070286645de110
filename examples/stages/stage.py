"""What a stage is: it reads a run folder, writes its own folder in it, and can be stopped at any moment.

A run folder holds `config.json` (every value that made it) and one folder per stage. A finished stage has `done.json`
with its result, seconds and peak memory; a stage without it is run again and continues from its own checkpoints.
So `python -m examples.run tiny` always means "finish what is missing". Nothing is ever mixed: a stage whose input has been made
again with another output since is an error that says so (`examples.stages.record`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.configs import RunConfig, to_dict
from examples.data.files import write_json
from examples.errors import UserError
from examples.stages import record
from examples.stages.record import read_done
from examples.train.metrics import peak_memory_bytes

__all__ = ["Context", "Stage", "open_run", "read_done", "remove_from", "run_stages", "write_json"]


@dataclass(frozen=True)
class Context:
    """What a stage gets: the run folder, its own folder, the configuration."""

    root: Path
    name: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        """This stage's own folder."""
        return self.root / self.name


@dataclass(frozen=True)
class Stage:
    """A named step of the recipe; `run(context)` returns a JSON-able result.

    needs: stages that must have finished; uses: stages that it also reads if they have. derived: it only tells what other stages
    left, so that it is made again when one of them is added or changes, where any other stage is an error. Its folder then stays, for
    it may hold answers that still count.
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    about: str
    uses: tuple[str, ...] = ()
    derived: bool = False


def open_run(root: Path, config: RunConfig, *, fresh: bool) -> None:
    """Create the run folder, or check that it was made with the same configuration."""
    path = root / "config.json"
    if root.exists() and not path.exists() and any(root.iterdir()):
        raise UserError(
            f"--run-dir: must be a run folder, or new or empty; got {root} with other files in it"
        )
    if fresh and path.exists():
        _empty(root, path)
    wanted = json.loads(json.dumps(to_dict(config)))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: must be JSON; got {error}") from None
        difference = _first_difference(found, wanted)
        if difference:
            key, old, new = difference
            raise UserError(
                f"{root}: was made with {key}={old!r} but this command asks for {new!r}; "
                "choose another --run-dir, or --fresh to start over"
            )
        return
    write_json(path, wanted)


def _empty(root: Path, config: Path) -> None:
    """Delete everything in a run folder, what makes it one last: killed in between, it still is one."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            (path / "done.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        elif path != config:
            path.unlink()
    config.unlink()


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if difference:
                return difference
        return None
    return None if old == new else (key, old, new)


# Fields of a stage's configuration that name a stage whose weights it reads; "" for none.
STARTS = ("start", "teacher", "student", "judged_by")


def needs(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    """The stages that must have finished before `stage`: always, and because the configuration says so."""
    section = getattr(config, stage.name, None)
    named = [str(getattr(section, key)) for key in STARTS if getattr(section, key, "")]
    return tuple(dict.fromkeys((*stage.needs, *named)))


def made_from(stage: Stage, stages: Sequence[Stage], config: RunConfig) -> list[Stage]:
    """The stages that `stage` is made from, and those they are made from, in order."""
    by_name = {s.name: s for s in stages}
    found: set[str] = set()
    todo = [*needs(stage, config), *stage.uses]
    while todo:
        name = todo.pop()
        if name not in by_name:
            raise UserError(f"{stage.name}: must start from a stage ({', '.join(by_name)}); got {name!r}")
        if name not in found:
            found.add(name)
            todo += needs(by_name[name], config)
    return [s for s in stages if s.name in found]


def remove_from(root: Path, name: str, stages: Sequence[Stage], config: RunConfig) -> list[str]:
    """Delete the folders of stage `name` and of every stage that is made from it; their names.

    The last ones go first: killed in between, no stage is left without its input.
    """
    doomed = [s.name for s in stages if name in (s.name, *(i.name for i in made_from(s, stages, config)))]
    there = [stage for stage in doomed if (root / stage).exists()]
    for stage in reversed(there):
        record.remove(root, stage)
    return there


def reset_peak_memory() -> None:
    """From here on `peak_memory_bytes` counts anew; where the system cannot, it goes on counting from the process's start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def run_stages(wanted: Sequence[Stage], root: Path, config: RunConfig, stages: Sequence[Stage]) -> float:
    """Run the stages `wanted` of all `stages` in order, skipping finished ones; the largest peak of memory, in MiB.

    Before each, it and everything that it is made from must still fit together.
    """
    largest = 0.0
    for number, stage in enumerate(wanted, 1):
        title = f"[{number}/{len(wanted)}] {stage.name}"
        before = made_from(stage, stages, config)
        for some in (*before, stage):
            _refuse_stale(root, some)
        inputs = {s.name: digest for s in before if (digest := record.output_of(root, s.name))}
        if read_done(root, stage.name) and not (stage.derived and _made_from(root, stage) != inputs):
            print(f"{title}: already done ({root / stage.name})", flush=True)
            continue
        for needed in needs(stage, config):
            if needed not in inputs:
                raise UserError(
                    f"stage {stage.name!r} needs stage {needed!r}, which has not finished in {root}"
                )
        if stage.derived:
            record.forget(root, stage.name)
        print(f"{title}: {stage.about}", flush=True)
        reset_peak_memory()
        start = time.monotonic()
        context = Context(root, stage.name, config)
        record.begin(root, stage.name, stage.about, to_dict(config), inputs)
        result = stage.run(context)
        seconds, memory = time.monotonic() - start, peak_memory_bytes() / 2**20
        done = {
            "result": result,
            "output": record.output_digest(context.folder, result),
            "seconds": seconds,
            "peak_memory_mib": memory,
        }
        write_json(context.folder / "done.json", done)
        largest = max(largest, memory)
        print(f"{title}: {seconds:.1f} s, peak memory {memory:.0f} MiB", flush=True)
    return largest


def _made_from(root: Path, stage: Stage) -> dict[str, str] | None:
    begun = record.read_begun(root, stage.name)
    return begun and begun["inputs"]


def _refuse_stale(root: Path, stage: Stage) -> None:
    name = stage.name
    changed = None if stage.derived else record.changed_input(root, name)
    if changed:
        raise UserError(
            f"{root}: stage {name!r} was made from an output of {changed!r} that is no longer there: {changed!r} was made again and "
            f"came out differently; --fresh-from {name} deletes {name!r} and what was made from it"
        )
