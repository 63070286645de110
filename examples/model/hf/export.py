"""A checkpoint of ours as a folder that transformers, vLLM and SGLang load.

    config.json  generation_config.json  tokenizer*.json  conversion.json
    model.safetensors.index.json  model-00001-of-000NN.safetensors ...

Weights are fp32, bf16, or FP8 in the released form; routing biases are fp32 in all three, as a bias rounded to bf16
would change who is chosen. The MTP modules are layers num_hidden_layers and up, with the copies of embedding and head that the
released files have there: readers that do not know MTP ignore them (transformers says so for other indices than 61).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.data.files import write_json
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.hf.checkpoint import CheckpointWeights, Weights, find_checkpoint
from examples.model.hf.config import BLOCK, Format, folder_config
from examples.model.hf.folder import INDEX, index_of, split_into_shards, write_folder
from examples.model.hf.fp8 import fp8_outputs, is_fp8, quantised
from examples.model.hf.names import Piece, mtp_copies, piece_shapes, pieces
from examples.model.hf.tensors import Group, Output
from examples.model.hf.tokenizer import check_tokenizer, copy_tokenizer, find_tokenizer

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportOptions:
    """How to write.

    form: type of the weights. pow2_scales: FP8 scales that are powers of two (V3.1's ue8m0). shard_bytes: size of a file.
    weights: trained, or their running average. mtp: with the MTP modules. tokenizer: its folder; None: the run's own.
    without_tokenizer: leave it out. fresh: forget an interrupted export.
    """

    form: Format = "bf16"
    pow2_scales: bool = False
    shard_bytes: int = SHARD_BYTES
    weights: Weights = "trained"
    mtp: bool = True
    tokenizer: Path | None = None
    without_tokenizer: bool = False
    fresh: bool = False


def export(
    source: Path, target: Path, options: ExportOptions, *, stage: str = "pretrain", quiet: bool = False
) -> Path:
    """Write the checkpoint that `source` means (see `find_checkpoint`) to the new folder `target`, and return it."""
    if options.form not in ("fp32", "bf16", "fp8"):
        raise UserError(f"--format: must be fp32, bf16 or fp8; got {options.form}")
    if options.pow2_scales and options.form != "fp8":
        raise UserError(f"--scale-format ue8m0: is for --format fp8; got {options.form}")
    source = find_checkpoint(source, stage)
    weights = CheckpointWeights(source, options.weights)
    config = weights.config if options.mtp else weights.without_mtp()
    tokenizer_folder = None
    bos, eos = 0, 1
    if not options.without_tokenizer:
        tokenizer_folder = options.tokenizer or find_tokenizer(source)
        if tokenizer_folder is None:
            raise UserError(f"{source}: has no tokenizer; name one with --tokenizer, or pass --no-tokenizer")
        tokenizer = check_tokenizer(tokenizer_folder, config.vocab_size)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
    shards = split_into_shards(export_groups(weights, config, options), options.shard_bytes)
    record = {
        "made_by": "deepseek_ops examples.hf export",
        "source": str(source.resolve()),
        "checkpoint": weights.seal,
        "step": weights.step,
        "weights": options.weights,
        "format": options.form,
        "pow2_scales": options.pow2_scales,
        "shard_bytes": options.shard_bytes,
        "mtp": config.mtp_depth,
    }

    def finish(folder: Path) -> None:
        write_json(
            folder / "config.json",
            folder_config(config, options.form, pow2_scales=options.pow2_scales, bos=bos, eos=eos),
        )
        write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, folder, longest=config.max_positions)
        write_json(folder / INDEX, index_of(shards))

    return write_folder(target, shards, record, finish, fresh=options.fresh, quiet=quiet)


def export_groups(weights: CheckpointWeights, config: ModelConfig, options: ExportOptions) -> list[Group]:
    """Every tensor of the folder in the released order, as what makes it."""
    shapes = piece_shapes(config)
    groups = [_group(weights, piece, shapes[piece[0]], options) for piece in pieces(config)]
    for name, our in mtp_copies(config):
        shape = (config.vocab_size, config.hidden_size)
        groups.append(_group(weights, (name, our, None, 0, None), shape, options))
    return groups


def _group(weights: CheckpointWeights, piece: Piece, shape: tuple[int, ...], options: ExportOptions) -> Group:
    name, our, expert, start, rows = piece
    if options.form == "fp8" and is_fp8(name):

        def make_fp8() -> Iterator[tuple[str, torch.Tensor]]:
            for block in weights.blocks(our, expert, start, rows, BLOCK):
                block = block if block.dtype in (torch.float32, torch.bfloat16) else block.float()
                yield from quantised(name, block, options.pow2_scales)

        return Group(fp8_outputs(name, shape), make_fp8)
    keep = options.form == "fp32" or name.endswith("e_score_correction_bias")
    dtype = torch.float32 if keep else torch.bfloat16

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        for block in weights.blocks(our, expert, start, rows):
            yield name, block.to(dtype)

    return Group((Output(name, dtype, shape),), make)
