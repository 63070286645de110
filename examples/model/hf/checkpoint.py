"""Our checkpoints, read by ranges of rows: of one process or of many ranks, never a whole tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from examples.data.files import read_json
from examples.errors import UserError
from examples.model.config import ModelConfig
from examples.model.hf.names import our_tensors
from examples.model.hf.tensors import Stored, read_header, row_blocks
from examples.model.transformer import Transformer
from examples.train.checkpoint import list_checkpoints, verify_checkpoint

Weights = Literal["trained", "ema"]


def find_checkpoint(path: Path, stage: str = "pretrain") -> Path:
    """The checkpoint that `path` means: itself, the newest of a stage or imported folder, or of `stage` in a run."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: must be a run folder, a stage's folder, or a checkpoint; there is none")
    if (path / "manifest.json").exists():
        return path
    for folder in (path, path / stage):
        if found := list_checkpoints(folder):
            return found[-1]
    raise UserError(f"{path}: has no checkpoint, and neither has {path / stage} (--stage names another)")


class CheckpointWeights:
    """Weights of a checkpoint under our names. Opening verifies every byte against its manifest.

    weights: "trained", what the forward pass reads; "ema", their running average (routing biases have none).
    """

    def __init__(self, path: Path, weights: Weights = "trained") -> None:
        self.path, self.weights = path, weights
        self.step = verify_checkpoint(path)
        self.seal = str(read_json(path / "manifest.json")["sha256"])
        meta = read_json(path / "meta.json")
        try:
            self.config = ModelConfig.from_dict(meta["config"]["model"])
        except (KeyError, TypeError):
            raise UserError(f"{path}: meta.json does not say which model this is (config.model)") from None
        self._parts: dict[str, list[Stored]] = {}
        for file in sorted(path.glob("*.safetensors")):
            for name, stored in read_header(file).items():
                self._parts.setdefault(name, []).append(stored)
        self._check()

    def without_mtp(self) -> ModelConfig:
        """The model's configuration, MTP modules left out."""
        return replace(self.config, mtp_depth=0)

    def dtype(self, name: str) -> torch.dtype:
        """Type in which the tensor of our name is stored."""
        return self._parts[self._key(name)][0].dtype

    def rows(self, name: str, start: int, rows: int, expert: int | None = None) -> torch.Tensor:
        """Rows of a tensor, or of one expert of a fused one, put together from the ranks' parts."""
        parts = self._select(name, expert)
        if len(parts) == 1:
            return parts[0].read(start, rows)
        whole = torch.empty(rows, *_whole_shape(parts)[1:], dtype=parts[0].dtype)
        for part in parts:
            first = max(start, part.offsets[0])
            last = min(start + rows, part.offsets[0] + part.shape[0])
            if first < last:
                place = [slice(first - start, last - start)]
                place += [slice(o, o + n) for o, n in zip(part.offsets[1:], part.shape[1:], strict=True)]
                whole[tuple(place)] = part.read(first - part.offsets[0], last - first)
        return whole

    def blocks(
        self, name: str, expert: int | None, start: int, rows: int | None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """A piece of a tensor (see `names.Piece`) in blocks of some megabytes and a multiple of `multiple` rows."""
        shape = _whole_shape(self._select(name, expert))
        rows = shape[0] - start if rows is None else rows
        for first, count in row_blocks(rows, math.prod(shape[1:]) * 4, multiple):
            yield self.rows(name, start + first, count, expert)

    def _select(self, name: str, expert: int | None) -> list[Stored]:
        parts = self._parts[self._key(name)]
        if expert is None:
            return parts
        places = [(part, expert - (part.offsets[0] if part.offsets else 0)) for part in parts]
        return [part.row(i) for part, i in places if 0 <= i < part.shape[0]]

    def _key(self, name: str) -> str:
        if self.weights == "ema" and not name.endswith(("router.bias", "router.counts")):
            return f"ema/shadow/{name}"
        return f"model/{name}"

    def _check(self) -> None:
        for name, tensor in our_tensors(self.config).items():
            if name.endswith("router.counts"):
                continue
            parts = self._parts.get(self._key(name))
            if parts is None:
                advice = "; --weights trained has them" if self.weights == "ema" else ""
                raise UserError(f"{self.path}: lacks the tensor {self._key(name)!r}{advice}")
            if _whole_shape(parts) != tuple(tensor.shape):
                raise UserError(
                    f"{self.path}: {self._key(name)!r} must have shape {tuple(tensor.shape)}; "
                    f"got {_whole_shape(parts)}"
                )
            if sum(math.prod(part.shape) for part in parts) != tensor.numel():
                raise UserError(f"{self.path}: the parts of {self._key(name)!r} do not make up the whole")


@torch.no_grad()
def load_weights(model: Transformer, path: Path, *, weights: Weights = "trained") -> CheckpointWeights:
    """Fill `model` with the weights of a checkpoint, of a run or imported, by blocks; returns the opened checkpoint.

    For stages that start from another stage's weights. Shapes must agree; types are cast, so that a model in bf16 can
    start from FP32 masters, and the other way round. A model without MTP may start from one that has it.
    """
    source = CheckpointWeights(path, weights)
    theirs = {n: tuple(t.shape) for n, t in our_tensors(source.config).items()}
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in wanted.items():
        if theirs.get(name) != tuple(tensor.shape):
            found = theirs.get(name, "absent")
            raise UserError(f"{path}: {name} is {found} there and {tuple(tensor.shape)} in this model")
    for name, tensor in wanted.items():
        if name.endswith("router.counts"):
            tensor.zero_()
            continue
        for first, count in row_blocks(tensor.shape[0], math.prod(tensor.shape[1:]) * 4):
            tensor.detach()[first : first + count].copy_(source.rows(name, first, count))
    return source


def _whole_shape(parts: list[Stored]) -> tuple[int, ...]:
    if len(parts) == 1:
        return parts[0].shape
    return tuple(
        max(o + n for o, n in zip(offsets, sizes, strict=True))
        for offsets, sizes in zip(
            zip(*(p.offsets for p in parts), strict=True),
            zip(*(p.shape for p in parts), strict=True),
            strict=True,
        )
    )
