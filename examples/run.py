"""One command for the recipe: `python -m examples.run tiny`.

    python -m examples.run NAME [--stages a,b] [--run-dir DIR] [--quick] [--fresh] [section.key=value ...]

Runs the stages of the report in order in one run folder (default runs/NAME). The same command after Ctrl-C, a crash
or a reboot continues where it stopped, to the bit. Every configuration value can be overridden by its dotted name,
e.g. `train.peak_lr=1e-3`. Exit status: 0 done, 2 a problem that the message names, 130 interrupted.
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
    arguments.add_argument("name", help=f"configuration: {', '.join(CONFIG_NAMES)}")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value")
    arguments.add_argument("--run-dir", type=Path, help="run folder (default runs/NAME)")
    arguments.add_argument("--stages", help="comma-separated subset, in recipe order (default: all)")
    arguments.add_argument("--quick", action="store_true", help="a shorter run: the whole story in 3 minutes")
    arguments.add_argument("--fresh", action="store_true", help="delete the run folder's stages first")
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
    config = get_config(options.name)
    if options.quick:
        config = quick(config)
    config = parse_overrides(config, options.overrides)

    import torch  # after the arguments: a typing mistake answers at once

    from examples.stages import OPTIONAL, RECIPE
    from examples.stages.stage import open_run, peak_memory_mib, run_stages

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads: must be at least 1; got {options.threads}")
        torch.set_num_threads(options.threads)
    stages = [*RECIPE, *OPTIONAL]
    names = [stage.name for stage in stages]
    default = [stage.name for stage in RECIPE]
    wanted = default if options.stages is None else [name.strip() for name in options.stages.split(",")]
    for name in wanted:
        if name not in names:
            raise UserError(f"--stages: must be among {', '.join(names)}; got {name!r}")
    root = options.run_dir or Path("runs") / options.name
    open_run(root, config, fresh=options.fresh)
    start = time.monotonic()
    run_stages([stage for stage in stages if stage.name in wanted], root, config)
    print(f"finished in {time.monotonic() - start:.0f} s, peak memory {peak_memory_mib():.0f} MiB")
    report = root / "report" / "report.html"
    if report.exists():
        print(f"report: {report.parent / 'report.md'} and {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
