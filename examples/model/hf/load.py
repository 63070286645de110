"""A local folder in Hugging Face form into our model, or into a checkpoint of ours.

Every tensor is accounted for before the first byte of any is read: missing, unexpected, of a wrong shape or type, FP8
without scales and scales without FP8 are errors that name tensor and file. FP8 weights are dequantised: exactly into
FP32 masters where our Linear computes in FP8 (which quantises them to the same bytes again), rounded to bf16 elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.data.files import disk_errors
from examples.errors import UserError
from examples.fields import to_dict
from examples.model.config import Precision
from examples.model.hf.config import model_config
from examples.model.hf.folder import HfFolder, split_into_shards, write_folder
from examples.model.hf.fp8 import SCALE, Source, scale_shape
from examples.model.hf.names import Piece, mtp_copies, our_tensors, piece_shapes, pieces, view
from examples.model.hf.tensors import Group, Output
from examples.model.hf.tokenizer import check_tokenizer, copy_tokenizer
from examples.model.transformer import Transformer
from examples.train.checkpoint import list_checkpoints, seal_checkpoint

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = (torch.float32, torch.float8_e8m0fnu)


class FolderWeights:
    """The weights of a folder under HF names, checked against a model: `config`, and `sources` by name."""

    def __init__(self, path: Path, *, precision: Precision = "bf16", mtp: bool = True) -> None:
        self.folder = HfFolder(Path(path))
        where = str(self.folder.path / "config.json")
        self.whole = model_config(
            self.folder.config, where, precision=precision
        )  # with what we may leave out
        self.config = self.whole if mtp else replace(self.whole, mtp_depth=0)
        self.sources = self._account()

    def _account(self) -> dict[str, Source]:
        tensors, wanted = self.folder.tensors, piece_shapes(self.config)
        shape = (self.config.vocab_size, self.config.hidden_size)
        copies = {name: shape for name, _ in mtp_copies(self.config)}
        missing = [name for name in wanted if name not in tensors]
        if missing:
            mtp = [name for name in missing if self._is_mtp(name)]
            advice = "; --no-mtp imports the model without its MTP modules" if mtp == missing else ""
            raise UserError(f"{self.folder.path}: {missing[0]} is missing{_more(missing)}{advice}")
        sources: dict[str, Source] = {}
        used = set()
        for name, shape in {**wanted, **copies}.items():
            stored = tensors.get(name)
            if stored is None:
                continue  # a copy that this folder does without
            used.add(name)
            if stored.shape != shape:
                raise UserError(f"{stored.file}: {name} must have shape {shape}; got {stored.shape}")
            if stored.dtype in _FLOATS:
                sources[name] = Source(stored)
                continue
            if stored.dtype != torch.float8_e4m3fn or len(shape) != 2:
                kind = str(stored.dtype).removeprefix("torch.")
                raise UserError(
                    f"{stored.file}: {name} must be float32, bfloat16, float16 or FP8; got {kind}"
                )
            scale = tensors.get(name + SCALE)
            if scale is None:
                raise UserError(f"{stored.file}: {name} is FP8, but its scales {name}{SCALE} are missing")
            if scale.shape != scale_shape(shape) or scale.dtype not in _SCALES:
                kind = str(scale.dtype).removeprefix("torch.")
                raise UserError(
                    f"{scale.file}: {scale.name} must be float32 {list(scale_shape(shape))}, one for each block "
                    f"of 128 x 128 begun; got {kind} {list(scale.shape)}"
                )
            used.add(scale.name)
            sources[name] = Source(stored, scale)
        dropped = {name for name in tensors if self._is_mtp(name)} if not self.config.mtp_depth else set()
        extra = sorted(tensors.keys() - used - dropped)
        if extra:
            base = extra[0].removesuffix(SCALE)
            near = difflib.get_close_matches(extra[0], wanted, n=1)
            why = ""
            if base in sources:
                why = f"; {base} is not FP8, so it has no scales"
            elif near:
                why = f"; the nearest name is {near[0]}"
            raise UserError(
                f"{tensors[extra[0]].file}: {extra[0]} has no place in this model{_more(extra)}{why}"
            )
        return sources

    def _is_mtp(self, name: str) -> bool:
        first = self.whole.num_layers
        layers = range(first, first + self.whole.mtp_depth)
        return any(name.startswith(f"model.layers.{layer}.") for layer in layers)

    def check_copies(self) -> None:
        """Copies of embedding and head beside MTP modules must be copies: the modules share ours (section 2.2)."""
        originals = {our: name for name, our, *_ in pieces(self.config)}
        for name, our in mtp_copies(self.config):
            if name in self.sources:
                original = self.sources[originals[our]]
                both = zip(
                    self.sources[name].blocks(torch.float32), original.blocks(torch.float32), strict=True
                )
                if not all(torch.equal(a, b) for a, b in both):
                    raise UserError(
                        f"{self.sources[name].stored.file}: {name} must equal {originals[our]}, "
                        "which the MTP module shares"
                    )


@torch.no_grad()
def load_model(path: Path, *, precision: Precision = "bf16", mtp: bool = True) -> Transformer:
    """The model in a folder, block by block: its memory is the model's."""
    weights = FolderWeights(path, precision=precision, mtp=mtp)
    weights.check_copies()
    with torch.device("meta"):
        model = Transformer(weights.config)
    model.to_empty(device="cpu")
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for router in model.routers():
        router.counts.zero_()
    for name, our, expert, start, rows in pieces(weights.config):
        target = view(ours[our].detach(), expert, start, rows)
        first = 0
        for block in weights.sources[name].blocks(target.dtype):
            target[first : first + len(block)].copy_(block)
            first += len(block)
    return model


def import_checkpoint(
    path: Path,
    target: Path,
    *,
    precision: Precision = "bf16",
    mtp: bool = True,
    shard_bytes: int = 5_000_000_000,
    fresh: bool = False,
    quiet: bool = False,
) -> Path:
    """Write the folder `path` as `target/checkpoints/step-00000000` and `target/tokenizer`; memory is one block.

    The checkpoint holds the model and nothing of an optimizer; `load_weights` fills a model from it, `export` writes
    it out again. Resumes by shard after a kill. Returns the checkpoint.
    """
    weights = FolderWeights(path, precision=precision, mtp=mtp)
    weights.check_copies()
    has_tokenizer = (weights.folder.path / "tokenizer.json").exists()
    if has_tokenizer:
        check_tokenizer(weights.folder.path, weights.config.vocab_size)
    shards = _checkpoint_shards(weights, shard_bytes)
    record = {
        "made_by": "deepseek_ops examples.hf import",
        "source": weights.folder.identity(),
        "model": to_dict(weights.config),
        "shard_bytes": shard_bytes,
    }
    meta: dict[str, Any] = {"step": 0, "tokens": 0, "config": {"model": to_dict(weights.config)}}

    folder = target / "checkpoints" / "step-00000000"
    if list_checkpoints(target):
        raise UserError(f"{target}: already has checkpoints; choose a new folder, or delete it")
    with disk_errors(target):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if has_tokenizer:
        copy_tokenizer(weights.folder.path, target / "tokenizer")
    return write_folder(
        folder, shards, record, lambda partial: seal_checkpoint(partial, 0, meta), fresh=fresh, quiet=quiet
    )


def _checkpoint_shards(weights: FolderWeights, shard_bytes: int) -> dict[str, list[Group]]:
    """Our tensors, each written piece after piece; files as the checkpoints of one process name them."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces(weights.config):
        parts.setdefault(piece[1], []).append(piece)
    groups = []
    for our, tensor in our_tensors(weights.config).items():
        key = f"model/{our}"
        output = Output(key, tensor.dtype, tuple(tensor.shape))
        if our not in parts:  # the routers' counts
            groups.append(
                Group((output,), lambda k=key, t=tensor: [(k, torch.zeros(t.shape, dtype=t.dtype))])
            )
            continue

        def make(key: str = key, our: str = our, dtype: torch.dtype = tensor.dtype) -> Iterator[Any]:
            for name, *_ in parts[our]:
                for block in weights.sources[name].blocks(dtype):
                    yield key, block

        groups.append(Group((output,), make))
    return {f"shard-00001-{name}": shard for name, shard in split_into_shards(groups, shard_bytes).items()}


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
