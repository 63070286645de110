"""One command for the recipe: `python -m examples.run tiny`.

    python -m examples.run NAME [--stages a,b] [--run-dir DIR] [--quick] [--fresh] [--fresh-from STAGE] [section.key=value ...]
    python -m examples.run --from DIR/STAGE [--run-dir NEW_DIR]

Runs the stages of the report in order in one run folder (default runs/NAME). The same command after Ctrl-C, a crash
or a reboot continues where it stopped, to the bit. Every configuration value can be overridden by its dotted name,
e.g. `train.schedule.learning_rate.peak=1e-3`. With --from a stage is made again from the configuration that its folder holds, with everything that it
was made from, and compared. Exit status: 0 done, 1 made again with another output, 2 a problem that the message names, 130
interrupted.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
from pathlib import Path

from examples.configs import CONFIG_NAMES, get_config, parse_overrides, quick
from examples.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m examples.run", description=__doc__.split("\n\n")[0])
    arguments.add_argument("name", nargs="?", help=f"configuration: {', '.join(CONFIG_NAMES)}")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value")
    arguments.add_argument("--run-dir", type=Path, help="run folder (default runs/NAME)")
    arguments.add_argument("--stages", help="comma-separated subset, in recipe order (default: all)")
    arguments.add_argument("--quick", action="store_true", help="a shorter run: the whole story in 4 minutes")
    arguments.add_argument("--fresh", action="store_true", help="delete the run folder's stages first")
    arguments.add_argument(
        "--fresh-from", metavar="STAGE", help="delete STAGE and what was made from it first"
    )
    arguments.add_argument("--from", dest="source", type=Path, metavar="DIR/STAGE", help="make a stage again")
    arguments.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            print(f"error: disk full{where}; free some space and run the same command again", file=sys.stderr)
            return 2
        raise


def _run(options: argparse.Namespace) -> int:
    if options.source:
        return _again(options)
    if options.name is None:
        raise UserError(
            f"name: must be a configuration ({', '.join(CONFIG_NAMES)}), or --from a stage's folder"
        )
    config = get_config(options.name)
    if options.quick:
        config = quick(config)
    config = parse_overrides(config, options.overrides)

    import torch  # after the arguments: a typing mistake answers at once

    from examples.stages import RECIPE
    from examples.stages.stage import open_run, remove_from, run_stages

    if threads := _threads(options.threads):
        torch.set_num_threads(threads)
    names = [stage.name for stage in RECIPE]
    wanted = names if options.stages is None else [name.strip() for name in options.stages.split(",")]
    for option, values in (("--stages", wanted), ("--fresh-from", [options.fresh_from or names[0]])):
        for name in values:
            if name not in names:
                raise UserError(f"{option}: must be among {', '.join(names)}; got {name!r}")
    root = options.run_dir or Path("runs") / options.name
    open_run(root, config, fresh=options.fresh)
    if options.fresh_from:
        removed = remove_from(root, options.fresh_from, RECIPE, config)
        print(f"deleted in {root}: {', '.join(removed) or 'nothing'}")
    start = time.monotonic()
    memory = run_stages([stage for stage in RECIPE if stage.name in wanted], root, config, RECIPE)
    print(f"finished in {time.monotonic() - start:.0f} s, peak memory {memory:.0f} MiB")
    report = root / "report" / "report.html"
    if report.exists():
        print(f"report: {report.parent / 'report.md'} and {report}")
    return 0


def _again(options: argparse.Namespace) -> int:
    """Make a stage again from its folder, in another run folder."""
    if options.name or options.overrides or options.quick or options.stages or options.fresh_from:
        raise UserError(
            "--from: takes configuration and stages from the folder; only --run-dir, --fresh, --threads may be given"
        )
    from examples.stages.reproduce import reproduce

    return reproduce(options.source, options.run_dir, threads=_threads(options.threads), fresh=options.fresh)


def _threads(threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise UserError(f"--threads: must be at least 1; got {threads}")
    return threads


if __name__ == "__main__":
    sys.exit(main())
