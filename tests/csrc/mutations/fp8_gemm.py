"""Mutation runs of fp8_gemm."""

from __future__ import annotations

from tests.csrc.gemm.dense_library import dense_library
from tests.csrc.gemm.test_fp8_gemm import BF16, FP32, Problem
from tests.csrc.mutation import Kernel, Site, sites


def kernels() -> list[Kernel]:
    """Several tiles of one block and of a cluster; accumulation, so that D is read as well as written."""
    driver = dense_library("fp8_gemm", checked=True)

    def kernel(name: str, shape: tuple[int, int, int], dtype, accumulate, tile, multicast) -> Kernel:
        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            # Positive operands: sums grow with K, so that a lost promotion shows in the bits.
            problem = Problem(*shape, dtype, accumulate=accumulate, positive=True)
            problem.checked = 1
            report = problem.run(
                driver, tile=tile, multicast=multicast, sms=2, seed=seed, asynchrony=asynchrony, schedule=schedule,
                drop_kind=drop[0].encode(), drop_site=drop[1].encode(),
            )  # fmt: skip
            return report or ("data" if problem.differing() else "")

        return Kernel(name, run, lambda: sites(driver))

    return [
        kernel("fp8_gemm, 128x128 bf16", (136, 264, 1200), BF16, False, (128, 128), "none"),
        kernel(
            "fp8_gemm, 128x112 fp32 accumulating, multicast a", (136, 232, 1200), FP32, True, (128, 112), "a"
        ),
        kernel("fp8_gemm, 64x256 bf16, multicast b", (130, 264, 1200), BF16, False, (64, 256), "b"),
    ]
