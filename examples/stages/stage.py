"""What a stage is: it reads a run folder, writes its own folder in it, and can be stopped at any moment.

A run folder holds `config.json` (every value that made it) and one folder per stage. A finished stage has `done.json`
with its result, seconds and peak memory; a stage without it is run again and continues from its own checkpoints.
So `python -m examples.run tiny` always means "finish what is missing".
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.configs import RunConfig, to_dict
from examples.errors import UserError


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
    """A named step of the recipe; `run(context)` returns a JSON-able result."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    about: str


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_done(root: Path, stage: str) -> dict[str, Any] | None:
    """The record of a finished stage, or None; a record that cannot be read is an error, not "not finished"."""
    path = root / stage / "done.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: must be JSON written by a finished stage; got {error}; delete it to rerun"
        ) from None


def open_run(root: Path, config: RunConfig, *, fresh: bool) -> None:
    """Create the run folder, or check that it was made with the same configuration."""
    path = root / "config.json"
    if root.exists() and not path.exists() and any(root.iterdir()):
        raise UserError(
            f"--run-dir: must be a run folder, or new or empty; got {root} with other files in it"
        )
    if fresh and path.exists():
        shutil.rmtree(root)
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


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            difference = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if difference:
                return difference
        return None
    return None if old == new else (key, old, new)


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_stages(stages: list[Stage], root: Path, config: RunConfig) -> None:
    """Run the stages in order, skipping finished ones."""
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if read_done(root, stage.name):
            print(f"{title}: already done ({root / stage.name})", flush=True)
            continue
        for needed in stage.needs:
            if read_done(root, needed) is None:
                raise UserError(
                    f"stage {stage.name!r} needs stage {needed!r}, which has not finished in {root}"
                )
        print(f"{title}: {stage.about}", flush=True)
        start = time.monotonic()
        context = Context(root, stage.name, config)
        context.folder.mkdir(parents=True, exist_ok=True)
        result = stage.run(context)
        seconds = time.monotonic() - start
        done = {"result": result, "seconds": seconds, "peak_memory_mib": peak_memory_mib()}
        write_json(context.folder / "done.json", done)
        print(f"{title}: {seconds:.1f} s, peak memory {done['peak_memory_mib']:.0f} MiB", flush=True)
