"""The names and rank files of deepseek-ai/DeepSeek-V3's own inference code (inference/model.py), to and from.

Its tool renames, gives each of `mp` ranks its rows or columns of the parallel Linears and its share of the experts, and
writes `model{rank}-mp{mp}.safetensors`; values do not change and FP8 stays FP8. It drops the MTP layer, for which that code
has no module: so do we unless asked; then it is under the same rules, with `enorm`, `hnorm`, `eh_proj` and `shared_head` as they
are. Whole weights are split so that no 128 x 128 block of scales is cut.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.data.files import read_json, write_json
from examples.errors import UserError
from examples.model.hf.config import BLOCK, model_config
from examples.model.hf.export import SHARD_BYTES
from examples.model.hf.folder import INDEX, index_of, split_into_shards, write_folder
from examples.model.hf.fp8 import SCALE, is_fp8, scale_shape
from examples.model.hf.load import FolderWeights
from examples.model.hf.names import mtp_copies, piece_shapes
from examples.model.hf.tensors import Group, Output, Stored, read_header, row_blocks
from examples.model.hf.tokenizer import FILES

# HF module -> (official module, axis that ranks divide; None: every rank has all of it).
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "up_proj": ("w3", 0),
    "down_proj": ("w2", 1),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
    "head": ("head", 0),  # of shared_head
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
    "eh_proj": ("eh_proj", None),
}
_SCOPES = {"self_attn": "attn", "mlp": "ffn"}
_LEAVES = {"weight": "weight", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors$")


def official_name(name: str) -> str:
    """HF name -> name in inference/model.py."""
    *scopes, module, leaf = name.removeprefix("model.").split(".")
    return ".".join([*(_SCOPES.get(s, s) for s in scopes), _MODULES[module][0], _LEAVES[leaf]])


def _axis(name: str) -> int | None:
    return _MODULES[name.split(".")[-2]][1]


def _owner(name: str, experts: int, ranks: int) -> int | None:
    """Rank of the routed expert that a tensor (either name) belongs to."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1]) // (experts // ranks)


# --- to rank files ----------------------------------------------------------------------------------------------------


def to_official(
    path: Path, target: Path, *, ranks: int, mtp: bool = False, fresh: bool = False, quiet: bool = False
) -> Path:
    """A folder in HF form -> `target/model{i}-mp{ranks}.safetensors`, config.json and tokenizer beside them."""
    weights = FolderWeights(path, mtp=mtp)
    experts = weights.config.num_experts
    if ranks < 1 or experts % ranks:
        raise UserError(f"--mp: must divide the {experts} experts; got {ranks}")
    tensors: list[tuple[str, Stored]] = []
    for name, source in weights.sources.items():
        tensors.append((name, source.stored))
        if source.scale is not None:
            tensors.append((name + SCALE, source.scale))
    files: dict[str, list[Group]] = {}
    for rank in range(ranks):
        groups = [
            _slice(name, stored, rank, ranks)
            for name, stored in tensors
            if _owner(name, experts, ranks) in (None, rank)
        ]
        files[f"model{rank}-mp{ranks}.safetensors"] = groups
    record = {
        "made_by": "deepseek_ops examples.hf convert to-official",
        "source": weights.folder.identity(),
        "ranks": ranks,
        "mtp": weights.config.mtp_depth,
    }

    def finish(folder: Path) -> None:
        write_json(
            folder / "config.json",
            {**weights.folder.config, "num_nextn_predict_layers": weights.config.mtp_depth},
        )
        _copy_tokenizer_files(weights.folder.path, folder)

    return write_folder(target, files, record, finish, fresh=fresh, quiet=quiet)


def _slice(name: str, stored: Stored, rank: int, ranks: int) -> Group:
    """The part of a tensor that one rank keeps."""
    axis = None if _EXPERT.search(name) else _axis(name)
    shape = list(stored.shape)
    first = [0] * len(shape)
    if axis is not None:
        if shape[axis] % ranks:
            raise UserError(f"--mp: must divide axis {axis} of {name}, shape {shape}; got {ranks}")
        size = shape[axis] // ranks
        if stored.dtype == torch.float8_e4m3fn and ranks > 1 and size % BLOCK:
            raise UserError(f"--mp: must cut {name}, shape {shape}, between blocks of {BLOCK}; got {ranks}")
        shape[axis], first[axis] = size, rank * size
    new = official_name(name)

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        for start, rows in row_blocks(shape[0], stored.row_bytes):
            block = stored.read(first[0] + start, rows)
            yield new, block.narrow(1, first[1], shape[1]) if axis == 1 else block

    return Group((Output(new, stored.dtype, tuple(shape)),), make)


# --- from rank files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What the ranks hold of one tensor, in order. axis None: copies, which must agree."""

    parts: tuple[Stored, ...]
    axis: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.axis is not None:
            shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        if self.axis == 0:
            for part in self.parts:
                for start, rows in row_blocks(part.shape[0], part.row_bytes):
                    yield part.read(start, rows)
            return
        for start, rows in row_blocks(self.shape[0], sum(part.row_bytes for part in self.parts)):
            blocks = [part.read(start, rows) for part in self.parts]
            if self.axis == 1:
                # As bytes: torch does not join FP8.
                size = blocks[0].dtype.itemsize
                joined = torch.cat([b.view(torch.uint8) for b in blocks], dim=1)
                assert joined.shape[1] % size == 0
                yield joined.view(blocks[0].dtype)
                continue
            for part, block in zip(self.parts, blocks, strict=True):
                if not torch.equal(block.view(torch.uint8), blocks[0].view(torch.uint8)):
                    raise UserError(
                        f"{part.file}: {part.name} must equal the copy in {self.parts[0].file.name}"
                    )
            yield blocks[0]


def from_official(
    path: Path,
    target: Path,
    *,
    config_file: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    fresh: bool = False,
    quiet: bool = False,
) -> Path:
    """Rank files -> a folder in HF form. config_file: the config.json of the HF release (default: the folder's)."""
    path = Path(path)
    headers = [read_header(file) for file in _rank_files(path)]
    config_file = config_file or path / "config.json"
    if not config_file.exists():
        raise UserError(f"{path}: has no config.json; name the released one with --config")
    values = read_json(config_file)
    full = model_config(values, str(config_file), precision="bf16")
    mtp = any(name.startswith(f"layers.{full.num_layers}.") for name in headers[0])
    config = full if mtp else model_config(values, str(config_file), precision="bf16", mtp=False)
    shapes = piece_shapes(config)
    shapes |= {name: (config.vocab_size, config.hidden_size) for name, _ in mtp_copies(config)}
    copies = {name for name, _ in mtp_copies(config)}

    groups: list[Group] = []
    used: set[str] = set()
    for name, shape in shapes.items():
        found = _gather(path, name, headers, config.num_experts)
        if found is None:
            if name in copies:
                continue
            raise UserError(f"{path}: {official_name(name)} (of {name}) is missing")
        if found.shape != shape:
            raise UserError(
                f"{found.parts[0].file}: {official_name(name)} must make up shape {shape}; got {found.shape}"
            )
        used.add(official_name(name))
        groups.append(_whole(name, found))
        if is_fp8(name) and found.parts[0].dtype == torch.float8_e4m3fn:
            scale = _gather(path, name + SCALE, headers, config.num_experts)
            if scale is None or scale.shape != scale_shape(shape):
                what = (
                    "is missing" if scale is None else f"must make up {scale_shape(shape)}; got {scale.shape}"
                )
                raise UserError(f"{found.parts[0].file}: {official_name(name + SCALE)} {what}")
            used.add(official_name(name + SCALE))
            groups[-1] = _joined(groups[-1], _whole(name + SCALE, scale))
    for header in headers:
        for name, stored in header.items():
            if name not in used:
                raise UserError(f"{stored.file}: {name} has no place in this model")
    shards = split_into_shards(groups, shard_bytes)
    record = {
        "made_by": "deepseek_ops examples.hf convert to-hf",
        "source": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in _rank_files(path)},
        "shard_bytes": shard_bytes,
    }

    def finish(folder: Path) -> None:
        write_json(folder / "config.json", {**values, "num_nextn_predict_layers": config.mtp_depth})
        _copy_tokenizer_files(path, folder)
        write_json(folder / INDEX, index_of(shards))

    return write_folder(target, shards, record, finish, fresh=fresh, quiet=quiet)


def _rank_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(
            f"{path}: must be a local folder of model{{rank}}-mp{{ranks}}.safetensors; there is none"
        )
    found = {int(m[1]): (int(m[2]), f) for f in path.iterdir() if (m := _RANK_FILE.match(f.name))}
    counts = {count for count, _ in found.values()}
    if len(counts) != 1:
        raise UserError(
            f"{path}: must hold the rank files of one split; found {sorted(f.name for _, f in found.values())}"
        )
    (ranks,) = counts
    for rank in range(ranks):
        if rank not in found:
            raise UserError(f"{path / f'model{rank}-mp{ranks}.safetensors'}: is missing")
    return [found[rank][1] for rank in range(ranks)]


def _gather(path: Path, name: str, headers: list[dict[str, Stored]], experts: int) -> _Parts | None:
    new = official_name(name)
    owner = _owner(name, experts, len(headers))
    ranks = range(len(headers)) if owner is None else [owner]
    parts = [headers[rank].get(new) for rank in ranks]
    if all(part is None for part in parts):
        return None
    for rank, part in zip(ranks, parts, strict=True):
        if part is None:
            raise UserError(f"{path / f'model{rank}-mp{len(headers)}.safetensors'}: {new} is missing")
    whole = tuple(part for part in parts if part is not None)
    if len({(part.shape, part.dtype) for part in whole}) != 1:
        raise UserError(f"{whole[0].file}: {new} must have one shape and type in all ranks")
    return _Parts(whole, None if owner is not None else _axis(name))


def _whole(name: str, parts: _Parts) -> Group:
    output = Output(name, parts.parts[0].dtype, parts.shape)
    return Group((output,), lambda: ((name, block) for block in parts.blocks()))


def _joined(weight: Group, scale: Group) -> Group:
    """Weight and scales in one group: they stay in one file."""
    return Group(weight.outputs + scale.outputs, lambda: itertools.chain(weight.make(), scale.make()))


def _copy_tokenizer_files(source: Path, target: Path) -> None:
    for name in (*FILES, "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
