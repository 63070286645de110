"""Mutation runs of bf16_gemm."""

from __future__ import annotations

from tests.csrc.gemm.bf16_problem import K_BY_OFFSETS
from tests.csrc.gemm.bf16_problem import Problem as Bf16Problem
from tests.csrc.gemm.dense_library import dense_library
from tests.csrc.mutation import Kernel, Site, sites


def kernels() -> list[Kernel]:
    """Both majors of both operands, a cluster, and groups of K whose last slice is cleared."""
    driver = dense_library("bf16_gemm", checked=True)

    def kernel(name: str, tile, multicast: str, **case) -> Kernel:
        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            problem = Bf16Problem(**case)
            problem.checked = 1
            report = problem.run(
                driver, tile=tile, multicast=multicast, sms=2, seed=seed, asynchrony=asynchrony, schedule=schedule,
                drop_kind=drop[0].encode(), drop_site=drop[1].encode(),
            )  # fmt: skip
            return report or ("data" if problem.differing() else "")

        return Kernel(name, run, lambda: sites(driver))

    groups = {"grouping": K_BY_OFFSETS, "index": [2, 3, 3, 470, 535, 900]}
    dense = {"m": 136, "n": 264, "k": 330}
    return [
        kernel("bf16_gemm, 128x128 bf16, both K-major", (128, 128), "none", **dense),
        kernel(
            "bf16_gemm, 128x192 accumulating, rows inside, multicast a, groups of K", (128, 192), "a",
            m=136, n=232, k=910, majors="mm", accumulate=True, **groups,
        ),
        kernel("bf16_gemm, 64x256 bf16 accumulating, multicast b", (64, 256), "b", majors="km", accumulate=True, **dense),
    ]  # fmt: skip
