"""FP8 weights of the released files: e4m3 with one fp32 multiplier per 128 x 128 block, in `<weight>_scale_inv`.

Blocks count from the tensor's own first row and the last ones may be short, so the 576 rows of kv_a_proj_with_mqa are
five blocks: ceil(rows / 128), never rows / blocks. (transformers 5.23 infers the block as rows // blocks and so refuses
those very tensors on a CPU, and reads 192 rows in 2 blocks as blocks of 96, silently wrong. Other readers are right.)

Ours are quantised as training quantises (`deepseek_ops.quantize.quantize_128x128`), byte for byte. Where our matrix is
two of theirs (q_a and kv_a, gate and up), the blocks are also the same if the first has a multiple of 128 rows, as in
V3. Quantising what was dequantised gives the same bytes again for fp32 scales (448 s / 448 rounds to s); with
powers of two it gives the same values, but a block whose amax was rounded down to a half of the range changes its scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deepseek_ops.quantize import dequantize_128x128, quantize_128x128
from examples.errors import UserError
from examples.model.hf.config import BLOCK
from examples.model.hf.tensors import Output, Stored, row_blocks

# eh_proj, gate, embeddings, norms and the head stay in bf16 in the released files.
_FP8_NAMES = re.compile(
    r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$"
)
SCALE = "_scale_inv"


def is_fp8(name: str) -> bool:
    """Whether the released files keep this tensor (HF name) in FP8."""
    return _FP8_NAMES.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]."""
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def fp8_outputs(name: str, shape: tuple[int, ...]) -> tuple[Output, Output]:
    """The weight and its scales, as tensors to be written."""
    return (
        Output(name, torch.float8_e4m3fn, shape),
        Output(name + SCALE, torch.float32, scale_shape(shape)),
    )


def quantised(name: str, block: torch.Tensor, pow2: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """A block of rows (a multiple of 128 but for the last) as the parts of the two tensors."""
    if not torch.isfinite(block).all():
        raise UserError(f"{name}: has infinite or NaN weights, which FP8 cannot hold; export another step")
    q, scale = quantize_128x128(block, pow2=pow2)
    yield name, q
    yield name + SCALE, scale


@dataclass(frozen=True)
class Source:
    """A weight of a folder: its tensor, and its scales if it is FP8."""

    stored: Stored
    scale: Stored | None = None

    def blocks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight in `dtype`, in blocks of rows. FP8: the fp32 product, rounded once more if dtype is bf16."""
        stored, scale = self.stored, self.scale
        if not stored.shape:
            yield stored.read().to(dtype)
            return
        wide = stored.row_bytes if scale is None else 4 * stored.row_bytes
        for start, rows in row_blocks(stored.shape[0], wide, 1 if scale is None else BLOCK):
            block = stored.read(start, rows)
            if scale is not None:
                factors = scale.read(start // BLOCK, math.ceil(rows / BLOCK)).float()
                if not bool(((factors > 0) & (factors < torch.inf)).all()):
                    raise UserError(f"{scale.file}: {scale.name}: scales must be positive and finite")
                block = dequantize_128x128(block, factors, dtype=torch.float32)
            if not torch.isfinite(block).all():
                raise UserError(f"{stored.file}: {stored.name}: has infinite or NaN values")
            yield block.to(dtype)
