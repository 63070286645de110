"""A stage made again from what its folder says about itself, and compared with it to the bit.

The folder may have been copied from anywhere: its stage.json holds the configuration, which stages it was made from, and the digests of
what they left. Bits also depend on code, torch, the processor's instructions and the number of threads: the threads are set as
they were, and where the rest differs the comparison says so.
"""

from __future__ import annotations

from pathlib import Path

import torch

from examples.configs import run_config_from_dict
from examples.errors import UserError
from examples.stages import record
from examples.stages.stage import open_run, run_stages


def reproduce(source: Path, root: Path | None, *, threads: int | None = None, fresh: bool = False) -> int:
    """Make the stage in `source` and its inputs again in `root`; status 0 if every output is the same, else 1."""
    from examples.stages import RECIPE

    source = source.resolve()
    begun = record.load(source)
    config = run_config_from_dict(begun["config"])
    root = root or Path("runs") / f"{config.name}-again"
    if root.resolve() == source.resolve().parent:
        raise UserError(f"--run-dir: must be another folder than the one to compare with; got {root}")
    name, there = begun["stage"], begun["processes"][-1]["environment"]
    known = {stage.name for stage in RECIPE}
    for stage in (name, *begun["inputs"]):
        if stage not in known:
            raise UserError(f"{source}: stages must be among {', '.join(sorted(known))}; got {stage!r}")
    torch.set_num_threads(threads or there["threads"])
    open_run(root, config, fresh=fresh)
    wanted = [stage for stage in RECIPE if stage.name in (name, *begun["inputs"])]
    run_stages(wanted, root, config, RECIPE)

    expected = dict(begun["inputs"])
    if (source / "done.json").exists():
        expected[name] = str(record.output_of(source.parent, source.name))
    else:
        print(f"{name}: has not finished in {source}; only what it was made from can be compared")
    different = [stage for stage, digest in expected.items() if record.output_of(root, stage) != digest]
    for stage in expected:
        print(
            f"{stage}: {'DIFFERS from' if stage in different else 'equal to the bit to'} what {source} tells"
        )
    here = record.environment()
    for key in here if different else ():
        if here[key] != there.get(key):
            print(f"  {key} here: {here[key]}; there: {there.get(key)}")
    return 1 if different else 0
