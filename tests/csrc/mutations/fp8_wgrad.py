"""Mutation runs of fp8_wgrad."""

from __future__ import annotations

from tests.csrc.gemm import test_fp8_wgrad as wgrad
from tests.csrc.gemm.test_fp8_gemm import BF16, FP32
from tests.csrc.mutation import Kernel, Site, sites


def kernels() -> list[Kernel]:
    """Groups of tokens, several tiles of one block and of a cluster; accumulation, so that D is read as well."""

    def kernel(name: str, shape: tuple[int, int, list[int]], dtype, accumulate, tile, multicast) -> Kernel:
        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            m, n, groups = shape
            problem = wgrad.Problem(
                m, n, sum(groups), groups, dtype=dtype, accumulate=accumulate, positive=True
            )
            problem.checked = 1
            report = problem.run(
                tile=tile, multicast=multicast, sms=2, seed=seed, asynchrony=asynchrony, schedule=schedule,
                drop_kind=drop[0].encode(), drop_site=drop[1].encode(),
            )  # fmt: skip
            return report or ("data" if problem.differing() else "")

        return Kernel(name, run, lambda: sites(wgrad.library()))

    return [
        kernel("fp8_wgrad, 128x128 bf16", (136, 136, [768, 0, 512]), BF16, False, (128, 128), "none"),
        kernel(
            "fp8_wgrad, 128x160 fp32 accumulating, multicast a",
            (136, 328, [1280]),
            FP32,
            True,
            (128, 160),
            "a",
        ),
        kernel("fp8_wgrad, 64x128 bf16, multicast b", (130, 136, [1152, 128]), BF16, True, (64, 128), "b"),
    ]
