"""fp8_gemm_decode among dependent launches (PDL): nothing of the kernel before is touched early, unless asked for."""

from __future__ import annotations

import ctypes

import pytest
import torch

import deepseek_ops
from deepseek_ops import gemm
from deepseek_ops import quantize as quant
from tests.csrc import building
from tests.csrc.building import ROOT
from tests.csrc.emulator.planted import rules_in

M, N, K, BLOCKS = 5, 136, 528, 5


class Chain(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x0", "x1", "a", "b", "scale_a", "scale_b", "d0", "d1")]
        + [(name, ctypes.c_int64) for name in ("m", "n", "k", "split_k")]
        + [(name, ctypes.c_int32) for name in ("prefetch_weights", "writes_weights")]
        + [(name, ctypes.c_void_p) for name in ("w", "scale_w")]
        + [("seed", ctypes.c_uint64), ("asynchrony", ctypes.c_int32), ("schedule", ctypes.c_int32)]
        + [("drop_kind", ctypes.c_char_p), ("drop_site", ctypes.c_char_p)]
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    driver = ROOT / "tests/csrc/gemm/decode_chain_driver.cpp"
    kernels = [ROOT / "csrc/gemm/fp8_decode.cu", ROOT / "csrc/quantize/quantize_rows.cu"]
    loaded = building.library("decode_chain", [driver], kernels)
    loaded.decode_chain.restype = ctypes.c_char_p
    return loaded


class Steps:
    """Two steps of decoding and what they must give."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = [torch.randn(M, K, generator=generator).bfloat16() for _ in range(2)]
        self.w = torch.randn(N, K, generator=generator).bfloat16()
        with deepseek_ops.backend("reference"):
            self.b, self.scale_b = quant.quantize_128x128(self.w)
            self.operands = [quant.quantize_1x128(x) for x in self.x]
        self.a = torch.zeros(M, K, dtype=torch.uint8)
        self.scale_a, self.scale_w = torch.zeros(BLOCKS, 8), torch.zeros(BLOCKS, 136)
        self.d = [torch.zeros(M, N), torch.zeros(M, N)]

    def run(
        self,
        library,
        split_k: int,
        prefetch: bool,
        writes_weights=False,
        seed=0,
        asynchrony=2,
        schedule=1,
        drop="",
    ) -> str:
        chain = Chain(
            *(t.data_ptr() for t in (*self.x, self.a, self.b, self.scale_a, self.scale_b, *self.d)),
            M, N, K, split_k, prefetch, writes_weights, self.w.data_ptr(), self.scale_w.data_ptr(),
            seed, asynchrony, schedule, b"grid_dependency_wait" if drop else b"", drop.encode(),
        )  # fmt: skip
        return library.decode_chain(ctypes.byref(chain)).decode()

    def right(self, split_k: int) -> bool:
        with deepseek_ops.backend("modelled"):
            want = [
                gemm.fp8_gemm_decode(*x, self.b, self.scale_b, out_dtype=torch.float32, split_k=split_k)
                for x in self.operands
            ]
        return all(map(torch.equal, self.d, want))


@pytest.mark.parametrize("prefetch", [False, True], ids=["", "prefetch"])
@pytest.mark.parametrize("split_k", [1, 4])
def test_steps_follow_each_other(library, split_k, prefetch):
    for seed in range(2):
        steps = Steps()
        assert (
            steps.run(library, split_k, prefetch, seed=seed, asynchrony=2 - seed, schedule=1 + 2 * seed) == ""
        )
        assert steps.right(split_k)


@pytest.mark.parametrize("split_k", [1, 4])
def test_without_the_wait_the_step_before_is_overtaken(library, split_k):
    source = (ROOT / "csrc/gemm/fp8_decode.cuh").read_text().splitlines()
    lines = [i + 1 for i, line in enumerate(source) if "grid_dependency_wait()" in line]
    assert len(lines) == 1
    report = Steps().run(library, split_k, False, drop=f"fp8_decode.cuh:{lines[0]}")
    assert "race" in rules_in(report), report


@pytest.mark.parametrize("split_k", [1, 4])
def test_weights_that_the_step_before_writes_must_not_be_prefetched(library, split_k):
    """What the argument's warning means, and that nothing is loaded early without it."""
    assert Steps().run(library, split_k, False, writes_weights=True) == ""
    report = Steps().run(library, split_k, True, writes_weights=True)
    assert "race" in rules_in(report), report
