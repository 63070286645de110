"""Hugging Face in and out, from the command line. Local folders only; nothing is downloaded and nothing unpickled.

    python -m examples.hf export RUN OUT [--format bf16|fp8|fp32] [--scale-format fp32|ue8m0] [--weights trained|ema]
    python -m examples.hf import FOLDER OUT [--precision bf16|fp8|fp32] [--no-mtp]
    python -m examples.hf convert to-official FOLDER OUT --mp 8 [--mtp]
    python -m examples.hf convert to-hf FOLDER OUT [--config config.json]

RUN is a run's folder (its stage `pretrain`, or --stage), a stage's folder, or a checkpoint. FOLDER and what `export` writes
are what `transformers.DeepseekV3ForCausalLM.from_pretrained` reads. Every command works block by block, so memory does not
grow with the model; the same command after a kill keeps the finished shards. Exit status: 0 done, 2 a problem that the message
names, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from examples.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes: 5GB, 500M, 1e9."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    try:
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"--shard-size: must be a size such as 5GB or 500MB; got {text!r}")
    return size


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m examples.hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    def command(into: argparse._SubParsersAction, name: str, about: str) -> argparse.ArgumentParser:
        one = into.add_parser(name, help=about, description=about)
        one.add_argument("source", type=Path)
        one.add_argument("target", type=Path, help="new folder")
        one.add_argument("--fresh", action="store_true", help="forget what an interrupted command left")
        return one

    export = command(commands, "export", "a checkpoint of ours -> a folder that transformers loads")
    export.add_argument("--stage", default="pretrain", help="stage of a run folder (default pretrain)")
    export.add_argument(
        "--format", default="bf16", choices=("bf16", "fp8", "fp32"), help="type of the weights"
    )
    export.add_argument(
        "--scale-format", default="fp32", choices=("fp32", "ue8m0"), help="ue8m0: powers of two"
    )
    export.add_argument("--weights", default="trained", choices=("trained", "ema"), help="ema: the average")
    export.add_argument("--shard-size", default="5GB", help="size of a file (default 5GB)")
    export.add_argument("--no-mtp", dest="mtp", action="store_false", help="leave the MTP modules out")
    export.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the run's)")
    export.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")

    load = command(commands, "import", "a folder in Hugging Face form -> a checkpoint of ours")
    load.add_argument(
        "--precision",
        default="bf16",
        choices=("bf16", "fp8", "fp32"),
        help="fp8: FP32 masters of FP8 Linears",
    )
    load.add_argument("--no-mtp", dest="mtp", action="store_false", help="leave the MTP modules out")
    load.add_argument("--shard-size", default="5GB", help="size of a file (default 5GB)")

    convert = commands.add_parser("convert", help="HF form <-> rank files of DeepSeek's inference code")
    ways = convert.add_subparsers(dest="way", required=True)
    there = command(ways, "to-official", "HF form -> model{rank}-mp{ranks}.safetensors")
    there.add_argument("--mp", type=int, required=True, help="model-parallel ranks")
    there.add_argument("--mtp", action="store_true", help="keep the MTP layer, which the official tool drops")
    back = command(ways, "to-hf", "model{rank}-mp{ranks}.safetensors -> HF form")
    back.add_argument("--config", type=Path, help="config.json of the HF release (default: the folder's own)")
    back.add_argument("--shard-size", default="5GB", help="size of a file (default 5GB)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        print(f"done: {_run(options)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command keeps the finished shards", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> Path:
    shard_bytes = parse_size(getattr(options, "shard_size", "5GB"))
    if options.command == "export":
        from examples.model.hf.export import ExportOptions, export

        choices = ExportOptions(
            form=options.format,
            pow2_scales=options.scale_format == "ue8m0",
            shard_bytes=shard_bytes,
            weights=options.weights,
            mtp=options.mtp,
            tokenizer=options.tokenizer,
            without_tokenizer=options.no_tokenizer,
            fresh=options.fresh,
        )
        return export(options.source, options.target, choices, stage=options.stage)
    if options.command == "import":
        from examples.model.hf.load import import_checkpoint

        return import_checkpoint(
            options.source,
            options.target,
            precision=options.precision,
            mtp=options.mtp,
            shard_bytes=shard_bytes,
            fresh=options.fresh,
        )
    from examples.model.hf.official import from_official, to_official

    if options.way == "to-official":
        return to_official(
            options.source, options.target, ranks=options.mp, mtp=options.mtp, fresh=options.fresh
        )
    return from_official(
        options.source,
        options.target,
        config_file=options.config,
        shard_bytes=shard_bytes,
        fresh=options.fresh,
    )


if __name__ == "__main__":
    sys.exit(main())
