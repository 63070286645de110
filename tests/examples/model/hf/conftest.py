"""Checkpoints of small models whose matrices end in short FP8 blocks, and folders made from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from examples.fields import to_dict
from examples.model.config import ModelConfig
from examples.model.hf.export import ExportOptions, export
from examples.model.transformer import Transformer
from examples.train.checkpoint import save_checkpoint

# kv_a has 136 + 8 = 144 rows: two blocks of which the last is short, as the released 576 rows end in a half one.
SHORT_BLOCKS = {"hidden_size": 144, "kv_lora_rank": 136, "dense_inner_size": 200, "num_experts": 4}
SHORT_BLOCKS |= {"num_groups": 2, "top_groups": 1, "top_k": 2, "expert_inner_size": 40}


class Kit:
    """What the tests share; reached through the fixture `kit`."""

    short_blocks = SHORT_BLOCKS

    @staticmethod
    def save(folder: Path, model: Transformer, **more: dict) -> Path:
        """A checkpoint as the trainer writes it (without an optimizer)."""
        ema = {"shadow": {n: p.detach().float() * 2 for n, p in model.named_parameters()}}
        meta = {"config": {"model": to_dict(model.config)}}
        return save_checkpoint(folder, 7, {"model": model.state_dict(), "ema": ema, **more}, meta)

    @staticmethod
    def export(source: Path, target: Path, **options: object) -> Path:
        """Export without a tokenizer and without lines."""
        choices = ExportOptions(**{"without_tokenizer": True, **options})  # type: ignore[arg-type]
        return export(source, target, choices, quiet=True)

    @staticmethod
    def read(folder: Path) -> dict[str, torch.Tensor]:
        """All tensors of a folder, by the safetensors library, which shares no code with ours."""
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                assert name not in found
                found[name] = tensor
        return found

    @staticmethod
    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the shards by a single file, as transformers may write it."""
        from safetensors.torch import save_file

        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            file.unlink()
        save_file(
            {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()},
            folder / "model.safetensors",
        )

    @staticmethod
    def header(file: Path) -> dict:
        """The JSON header of a file."""
        with open(file, "rb") as handle:
            return json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Helpers."""
    return Kit()


@pytest.fixture(scope="session")
def bits():
    """`same_bits`."""
    return same_bits


@pytest.fixture(scope="session")
def small(ref) -> ModelConfig:
    """The bf16 model of these tests, with an MTP module."""
    return ref.config(**SHORT_BLOCKS, precision="bf16")


@pytest.fixture(scope="session")
def model(ref, small) -> Transformer:
    """Random weights with every norm and bias away from its initial value. Not to be written to."""
    return ref.model(small, seed=4)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, kit, model) -> Path:
    """Its checkpoint."""
    return kit.save(tmp_path_factory.mktemp("run") / "pretrain", model)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, kit, saved):
    """Folders of it in bf16 and in FP8, in many shards. Not to be written to; `copy` is."""
    root = tmp_path_factory.mktemp("hf")
    return {form: kit.export(saved, root / form, form=form, shard_bytes=60_000) for form in ("bf16", "fp8")}


@pytest.fixture
def copy(exported, tmp_path):
    """A private copy of one of the folders."""
    import shutil

    def make(form: str = "bf16") -> Path:
        return Path(shutil.copytree(exported[form], tmp_path / form))

    return make
